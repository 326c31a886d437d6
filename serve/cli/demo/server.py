"""A server of its own for the demo: a free port, a temporary data directory, and nothing left of either.

A demo that is told to end, by a signal or by its terminal, ends it too. One that is killed leaves its folder, and the
kernel ends its server.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

import httpx

from serve.errors import LoradockError
from serve.vllm_backend.forkserver import die_with_parent

# Small, so that it fits beside other work; drift compares with the first 60 requests instead of the first 1,000.
SETTINGS = (
    "--host", "127.0.0.1", "--max-model-len", "2048", "--kv-cache-memory-bytes", "512M",
    "--drift-reference", "60", "--drift-threshold", "1e4",
)  # fmt: skip
START_SECONDS, STOP_SECONDS = 900.0, 45.0
# Without these Python would end at once, and nothing be tidied.
ENDING = (signal.SIGTERM, signal.SIGHUP)
# Settings of the user's own server that this one shares: where models and compiled code are kept.
SHARED = ("LORADOCK_CACHE_DIR",)
LAST_LINES = 5


class ServerEnded(LoradockError):
    """The demo's server did not start."""


@contextmanager
def own_server(wait: Callable[[float], None] = time.sleep) -> Iterator[str]:
    """The address of a server that is ready; it and its folder are gone afterwards."""
    with _ending_in_order(), tempfile.TemporaryDirectory(prefix="loradock-demo-") as folder:
        log = Path(folder) / "log"
        port = _free_port()
        command = [sys.executable, "-m", "serve.cli", "serve", "smollm2", "--port", str(port), *SETTINGS]
        command += ["--data-dir", str(Path(folder) / "data")]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        try:
            url = f"http://127.0.0.1:{port}"
            _until_ready(process, url, log, wait)
            yield url
        finally:
            _stop(process)


@contextmanager
def _ending_in_order() -> Iterator[None]:
    """Leave by an exception when a signal says so, as Ctrl-C does."""
    before = {number: signal.signal(number, _leave) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave(number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name in SHARED or not name.startswith("LORADOCK_")}


def _until_ready(process: subprocess.Popen[bytes], url: str, log: Path, wait: Callable[[float], None]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with suppress(httpx.TransportError):
            if httpx.get(f"{url}/ready", timeout=5.0).status_code == 200:
                return
        wait(0.5)
    lines = "\n".join(log.read_text(errors="replace").splitlines()[-LAST_LINES:])
    raise ServerEnded(f"the demo's server did not start; `loradock doctor` looks at this machine. It said:\n{lines}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """It and its engine: they are a session of their own."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
