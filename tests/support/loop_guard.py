"""Fails a test in which a request makes the event loop wait: for a disk, a database, the network, or long arithmetic.

While the app of a server in this process takes a step, nothing may open a file, speak to a database or connect to a
host, and no step may compute for longer than `STEP_SECONDS`. What happens on other threads is nobody's concern here.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Engine, event
from starlette.types import Receive, Scope, Send

from serve.asgi.origin import OriginCheck

# Of the processor's time, not the clock's: another process that has the core is not the server's fault.
STEP_SECONDS = 2.0
WAITING = {
    "open",
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "shutil.rmtree",
    "socket.connect",
    "socket.getaddrinfo",
}
# Modules that are imported at their first use, and what the kernel answers from memory.
QUICK = (".py", ".pyc", ".so")
QUICK_FOLDERS = ("/proc/", "/sys/", "/dev/")
# How a frame names code that has no file; a traceback looks for its lines.
NO_FILE = "<"

_step = threading.local()
violations: list[str] = []


class _Stepped:
    """A call of the app, watched at each step that it takes."""

    def __init__(self, call: Any, path: str) -> None:
        self._call = call
        self._path = path

    def __await__(self) -> Generator[Any, Any, None]:
        inner = self._call.__await__()
        value: Any = None
        error: BaseException | None = None
        while True:
            outer, _step.path = getattr(_step, "path", None), self._path
            began = time.thread_time()
            try:
                future = inner.send(value) if error is None else inner.throw(error)
            except StopIteration:
                return
            finally:
                _step.path = outer
                if (seconds := time.thread_time() - began) > STEP_SECONDS:
                    violations.append(f"{self._path}: a step computed for {seconds:.2f} s")
            try:
                value, error = (yield future), None
            except BaseException as raised:
                error = raised


def _record(what: str) -> None:
    path = getattr(_step, "path", None)
    if path is not None:
        frames = [frame for frame in traceback.extract_stack() if "/serve/" in frame.filename]
        where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "?"
        violations.append(f"{path}: {what} at {where}")


def _audit(name: str, arguments: tuple[Any, ...]) -> None:
    if name in WAITING and getattr(_step, "path", None) is not None:
        subject = str(arguments[0]) if arguments else ""
        if name == "open" and (subject.endswith(QUICK) or subject.startswith((*QUICK_FOLDERS, NO_FILE))):
            return
        _record(f"{name} {subject[-80:]}")


def _query(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
    _record(f"SQL {' '.join(statement.split())[:60]}")


def install() -> None:
    """From now on, in this process."""
    original = OriginCheck.__call__

    def call(self: OriginCheck, scope: Scope, receive: Receive, send: Send) -> Any:
        return _Stepped(original(self, scope, receive, send), f"{scope.get('method', '')} {scope.get('path', '')}")

    OriginCheck.__call__ = call  # type: ignore[method-assign]
    sys.addaudithook(_audit)
    event.listen(Engine, "before_cursor_execute", _query)


@contextmanager
def guarded() -> Iterator[None]:
    """AssertionError at the end, if the loop waited meanwhile."""
    violations.clear()
    yield
    seen = list(dict.fromkeys(violations))
    violations.clear()
    assert not seen, "a request made the event loop wait:\n  " + "\n  ".join(seen)
