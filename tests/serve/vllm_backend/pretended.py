"""A compiler that needs no vLLM."""

from __future__ import annotations

import time
from multiprocessing.connection import Connection


def pretend(connection: Connection) -> None:
    """Compiles every pattern but these."""
    connection.send(None)
    while True:
        outputs = connection.recv()
        if outputs.regex == "slow":
            time.sleep(600)
        if outputs.regex == "crash":
            raise SystemExit(3)
        connection.send("it is wrong" if outputs.regex == "wrong" else outputs)
