"""A compiler that needs no vLLM."""

from __future__ import annotations

import os
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


def tell_of_gpus(connection: Connection) -> None:
    """Answers with the GPUs that this process may see."""
    connection.send(None)
    while True:
        connection.recv()
        connection.send([os.environ.get("CUDA_VISIBLE_DEVICES")])
