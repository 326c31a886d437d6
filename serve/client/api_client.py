"""The connection to a running server: one request, its errors under our names, tried again where that is safe.

Errors of the server arrive as the classes of `serve.errors`, with the server's own sentence. Beside them:

    LoradockError
    |- ConfigError       the path is nothing that can be pushed
    |- Unreachable       no answer, after as many attempts as are safe
    `- Refused           a status or a body that no loradock server sends: a proxy, or another product
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx

from serve import errors
from serve.errors import AdapterRejected, ConfigError, EngineUnavailable, LoradockError

_BY_STATUS: dict[int, type[LoradockError]] = {
    kind.status: kind
    for kind in (
        errors.BadRequest,
        errors.Unauthorized,
        errors.Forbidden,
        errors.NotFound,
        errors.Conflict,
        errors.TooLarge,
        errors.QuotaExceeded,
        errors.OutOfSpace,
    )
}


Answer = TypeVar("Answer")


class Unreachable(LoradockError):
    """Nobody answered."""

    type = "connection_error"


class Refused(LoradockError):
    """The answer is not one of loradock's."""


@dataclass(frozen=True, slots=True)
class Retry:
    """How often to try, and how long to wait in between, in seconds."""

    attempts: int = 4
    first_wait: float = 0.5
    longest_wait: float = 30.0

    def wait(self, attempt: int, asked: float | None = None) -> float:
        """Twice as long each time, and at least as long as the server asked for."""
        wait = self.first_wait * 2.0**attempt * random.uniform(0.75, 1.25)
        return min(self.longest_wait, max(wait, asked or 0.0))


class ApiClient:
    """Speaks JSON with a server; changes are repeated only when the server cannot have seen them."""

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        key: str | None = None,
        *,
        retry: Retry | None = None,
        timeout: float = 300.0,
        sleep: Callable[[float], None] = time.sleep,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        if not self._url.startswith(("http://", "https://")):
            raise ConfigError(f"{url!r} is not an address of the form http://HOST:PORT")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        # A push is answered only after the adapter was checked and loaded, which takes its time on a busy engine.
        patience = httpx.Timeout(timeout, connect=10.0)
        self._http = httpx.Client(base_url=self._url, headers=headers, timeout=patience, transport=transport)
        self._retry = retry or Retry()
        self._sleep = sleep

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def _call(self, method: str, path: str, **parts: Any) -> dict[str, Any]:
        return self._ask(lambda: self._http.request(method, path, **parts), repeatable=method == "GET")

    def _ask(self, send: Callable[[], httpx.Response], repeatable: bool) -> dict[str, Any]:
        return self._tried(lambda: self._read(send()), repeatable)

    def _download(self, path: str, file: Path) -> None:
        """Write what the server sends to `file`, whole."""

        def written() -> None:
            with self._http.stream("GET", path) as response, file.open("wb") as sink:
                if response.status_code != 200:
                    response.read()
                    self._read(response)
                for chunk in response.iter_bytes():
                    sink.write(chunk)

        self._tried(written, repeatable=True)

    def _tried(self, call: Callable[[], Answer], repeatable: bool) -> Answer:
        for attempt in range(self._retry.attempts):
            last = attempt == self._retry.attempts - 1
            try:
                with self._translated(repeatable):
                    return call()
            except _TryAgain as again:
                if last:
                    raise again.error from again.__cause__
                self._sleep(self._retry.wait(attempt, again.after))
        raise ValueError("Retry.attempts must be at least 1")

    @contextmanager
    def _translated(self, repeatable: bool) -> Iterator[None]:
        """httpx's errors become ours; those that may be tried again, `_TryAgain`."""
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as refused:
            raise _TryAgain(Unreachable(f"cannot connect to {self._url}; is the server running?")) from refused
        except httpx.TimeoutException as slow:
            raise Unreachable(f"{self._url} did not answer in time; see with `show` whether it is done") from slow
        except httpx.TransportError as dropped:
            error = Unreachable(f"the connection to {self._url} dropped before the answer ({dropped})")
            if repeatable:
                raise _TryAgain(error) from dropped
            raise error from dropped
        except httpx.InvalidURL as wrong:
            raise ConfigError(f"{self._url!r} is not an address of the form http://HOST:PORT") from wrong

    def _read(self, response: httpx.Response) -> dict[str, Any]:
        body = _json(response)
        if response.is_success:
            if body is None and response.content:
                raise Refused(f"{self._url} answered something that is not JSON; is it a loradock server?")
            return body or {}
        error = _error(response, body, self._url)
        if response.status_code == EngineUnavailable.status:
            raise _TryAgain(error, _seconds(response.headers.get("Retry-After")))
        raise error

    def _bytes(self, path: str, params: Mapping[str, Any]) -> bytes:
        with self._translated(repeatable=True):
            response = self._http.get(path, params=params)
            if response.status_code != 200:
                self._read(response)
            return response.content


class _TryAgain(Exception):
    def __init__(self, error: LoradockError, after: float | None = None) -> None:
        super().__init__(str(error))
        self.error = error
        self.after = after


def _error(response: httpx.Response, body: dict[str, Any] | None, url: str) -> LoradockError:
    status = response.status_code
    error = body.get("error") if body is not None else None
    if not isinstance(error, dict) or not isinstance(error.get("message"), str):
        if status in (502, EngineUnavailable.status, 504):  # a proxy's, while the server starts again
            return EngineUnavailable(f"{url} answered {status}: the server is not ready")
        begin = response.text[:200].strip()
        return Refused(f"{url} answered {status} in a form that is not loradock's; is it a loradock server? {begin}")
    message, code = error["message"], error.get("code")
    if status == AdapterRejected.status:
        problems = error.get("problems")
        return AdapterRejected(message, problems=problems if isinstance(problems, list) else None, code=code)
    if status == EngineUnavailable.status:
        return EngineUnavailable(message)
    return _BY_STATUS.get(status, Refused)(message, code=code, param=error.get("param"))


def _json(response: httpx.Response) -> dict[str, Any] | None:
    try:
        body = response.json()
    except ValueError:
        return None
    return body if isinstance(body, dict) else None


def _seconds(header: str | None) -> float | None:
    """Retry-After in seconds; its other form, a date, counts as nothing said."""
    return float(header) if header is not None and header.strip().isdigit() else None
