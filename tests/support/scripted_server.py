"""A server over an engine core that runs elsewhere (tests.support.scripted_core): `loradock serve`, or vLLM's own.

    python -P tests/support/scripted_server.py loradock INPUT OUTPUT serve MODEL --port 8000 ...
    python -P tests/support/scripted_server.py vllm INPUT OUTPUT serve MODEL --port 8000 ...

INPUT and OUTPUT are the addresses of ZeroMQ sockets. It imports nothing of tests: with another PYTHONPATH it starts
the server of another checkout. PROFILE=FILE in the environment writes cProfile's statistics of the event loop there.
"""

from __future__ import annotations

import cProfile
import os
import signal
import sys
from typing import Any


def connect(addresses: dict[str, str]) -> None:
    """From now on this process's engines are the one at these addresses."""
    from vllm.v1.engine.core_client import EngineCoreClient

    make = EngineCoreClient.make_async_mp_client

    def connected(vllm_config: Any, executor_class: Any, log_stats: bool, *_: Any, **more: Any) -> Any:
        return make(vllm_config, executor_class, log_stats, client_addresses=addresses, renderer=more.get("renderer"))

    EngineCoreClient.make_async_mp_client = staticmethod(connected)


def loradock(addresses: dict[str, str]) -> None:
    from serve.cli.entry import main
    from serve.server import launch

    run = launch._run

    def connected(*arguments: Any) -> int:
        connect(addresses)
        return run(*arguments)

    launch._run = connected
    main()


def vllm(addresses: dict[str, str]) -> None:
    connect(addresses)
    from vllm.entrypoints.cli.main import main

    main()


def profiled(file: str) -> None:
    """Profile from SIGUSR1 to SIGUSR2."""
    profile = cProfile.Profile()
    signal.signal(signal.SIGUSR1, lambda *_: profile.enable())

    def end(*_: object) -> None:
        profile.disable()
        profile.dump_stats(file)

    signal.signal(signal.SIGUSR2, end)


if __name__ == "__main__":
    kind, where_from, where_to, *words = sys.argv[1:]
    sys.argv = [kind, *words]
    if file := os.environ.get("PROFILE"):
        profiled(file)
    {"loradock": loradock, "vllm": vllm}[kind]({"input_address": where_from, "output_address": where_to})
