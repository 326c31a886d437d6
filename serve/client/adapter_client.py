"""Speaks the adapter and key API of a running server.

Errors of the server arrive as the classes of `serve.errors`, with the server's own sentence. Beside them:

    LoradockError
    |- ConfigError       the path is nothing that can be pushed
    |- Unreachable       no answer, after as many attempts as are safe
    `- Refused           a status or a body that no loradock server sends: a proxy, or another product

Repeating is safe for a push, because the server knows the bytes by their digest: it answers 200 instead of 201 when an
earlier attempt had arrived after all. Changes of a pointer are repeated only when the server cannot have seen them.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx

from serve import errors
from serve.client.upload_progress import CountedFile, Progress, UploadProgress
from serve.errors import AdapterRejected, ConfigError, EngineUnavailable, LoradockError

PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")
SHARDS = "adapter_model-*-of-*.safetensors"
CARD = "README.md"
ARCHIVES = (".zip", ".tar.gz", ".tgz")
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


class Unreachable(LoradockError):
    """Nobody answered."""


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


class AdapterClient:
    """Push, list, show, promote, roll back and remove adapters."""

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

    def push(
        self,
        name: str,
        path: str | Path,
        *,
        promote: bool = True,
        shared: bool | None = None,
        why: str = "",
        probe_min_effect: float | None = None,
        progress: Progress | None = None,
    ) -> dict[str, Any]:
        """Upload a PEFT folder or an archive of one; the files are read while they are sent.

        `shared` lets other tenants ask the adapter or stops them; None leaves that as it is, and a new one private.

        `probe_min_effect` is what the probe asks of this version, in the place of the server's setting.

        `progress(sent, total)` counts bytes of the files, and starts again at 0 when the upload does.
        """
        files = adapter_files(path)
        total = sum(file.stat().st_size for file in files)

        def send() -> httpx.Response:
            with ExitStack() as open_files:
                counter = UploadProgress(total, progress)
                parts = [
                    ("files", (file.name, CountedFile(open_files.enter_context(file.open("rb")), counter)))
                    for file in files
                ]
                fields = {"name": name, "promote": "true" if promote else "false"}
                if shared is not None:
                    fields["visibility"] = _visibility(shared)
                fields |= _because(why)
                if probe_min_effect is not None:
                    fields["probe_min_effect"] = str(probe_min_effect)
                return self._http.post("/v1/adapters", data=fields, files=parts)  # type: ignore[arg-type]

        return self._ask(send, repeatable=True)

    def push_source(
        self,
        name: str,
        source: str,
        *,
        promote: bool = True,
        shared: bool | None = None,
        why: str = "",
        probe_min_effect: float | None = None,
    ) -> dict[str, Any]:
        """Have the server fetch an adapter from hf://, s3:// or a file:// that it allows; `shared` as in `push`."""
        body: dict[str, Any] = {"name": name, "source": source, "promote": promote} | _because(why)
        if probe_min_effect is not None:
            body["probe_min_effect"] = probe_min_effect
        if shared is not None:
            body["visibility"] = _visibility(shared)
        return self._ask(lambda: self._http.post("/v1/adapters", json=body), repeatable=True)

    def list(self) -> list[dict[str, Any]]:
        """All adapters that this key may see."""
        answer = self._call("GET", "/v1/adapters")
        adapters: list[dict[str, Any]] = answer.get("data", [])
        return adapters

    def show(self, name: str) -> dict[str, Any]:
        """The versions of one adapter, which is live, and its history."""
        return self._call("GET", _path(name))

    def promote(
        self, name: str, version: int, expected_version: int | None = None, *, at_once: bool = False, why: str = ""
    ) -> dict[str, Any]:
        """Make `version` live; with `expected_version`, only if that one is live now; `at_once` without a canary."""
        body: dict[str, Any] = {"version": version} | _because(why)
        if at_once:
            body["at_once"] = True
        if expected_version is not None:
            body["expected_version"] = expected_version
        return self._call("POST", f"{_path(name)}/promote", json=body)

    def rollback(self, name: str, expected_version: int | None = None, *, why: str = "") -> dict[str, Any]:
        """Make the version live that was live before; with `expected_version`, only if that one is live now."""
        body: dict[str, Any] = {} if expected_version is None else {"expected_version": expected_version}
        return self._call("POST", f"{_path(name)}/rollback", json=body | _because(why))

    def canary(self, name: str, version: int, weight: float, *, why: str = "") -> dict[str, Any]:
        """Send a share of the name's requests, 0 to 1, to `version`; 0 ends it."""
        return self._call("POST", f"{_path(name)}/canary", json={"version": version, "weight": weight} | _because(why))

    def shadow(self, name: str, version: int, weight: float, *, why: str = "") -> dict[str, Any]:
        """Have `version` answer a share of the name's requests too, unseen; 0 ends it."""
        body = {"version": version, "weight": weight} | _because(why)
        return self._call("POST", f"{_path(name)}/shadow", json=body)

    def pin(self, name: str, version: int | None = None) -> dict[str, Any]:
        """Keep `version` in the engine; without one, whichever is live."""
        return self._call("POST", f"{_path(name)}/pin", json={} if version is None else {"version": version})

    def unpin(self, name: str) -> dict[str, Any]:
        """Let the adapter's versions come and go again."""
        return self._call("DELETE", f"{_path(name)}/pin")

    def build_baseline(
        self, name: str, prompts: Sequence[Any], version: int | None = None, max_tokens: int = 64
    ) -> dict[str, Any]:
        """Have a version answer these prompts, and hold its later traffic against that."""
        body = {"prompts": prompts, "max_tokens": max_tokens} | ({} if version is None else {"version": version})
        return self._call("POST", f"{_path(name)}/baseline", json=body)

    def save_baseline(self, name: str, version: int | None = None) -> bytes:
        """A version's baseline, as it is shipped."""
        return self._bytes(f"{_path(name)}/baseline", _numbered(version))

    def ship_baseline(self, name: str, data: bytes, version: int | None = None) -> dict[str, Any]:
        """Hold a version against a baseline that was saved."""
        return self._call("PUT", f"{_path(name)}/baseline", params=_numbered(version), content=data)

    def put_golden(self, name: str, document: Mapping[str, Any]) -> dict[str, Any]:
        """Keep a golden set, `{"cases": [...]}`, in the place of an earlier one."""
        return self._call("PUT", f"{_path(name)}/golden", json=dict(document))

    def golden(self, name: str) -> dict[str, Any]:
        """The adapter's golden set."""
        return self._call("GET", f"{_path(name)}/golden")

    def golden_results(self, name: str, version: int | None = None) -> dict[str, Any]:
        """Scores by version, and each case of `version` (default: the live one)."""
        return self._call("GET", f"{_path(name)}/golden/results", params=_numbered(version))

    def run_golden(self, name: str, version: int | None = None) -> dict[str, Any]:
        """Have a version answer the golden set again, in the gaps of traffic."""
        return self._call("POST", f"{_path(name)}/golden/run", json=_numbered(version))

    def remove_golden(self, name: str) -> dict[str, Any]:
        """Forget the golden set with all outcomes."""
        return self._call("DELETE", f"{_path(name)}/golden")

    def drift(self, name: str) -> dict[str, Any]:
        """What moved of an adapter, by version and signal, and how its canary does."""
        return self._call("GET", f"{_path(name)}/drift")

    def acknowledge_drift(self, name: str, version: int | None = None) -> dict[str, Any]:
        """The alarms of a version (the live one), or of a base, have been dealt with: the evidence begins again."""
        return self._call("POST", f"{_path(name)}/drift/acknowledge", json=_numbered(version))

    def accept_drift(
        self, name: str, version: int | None = None, signals: str = "both", note: str = ""
    ) -> dict[str, Any]:
        """Make a version's recent traffic its reference: of its prompts (`prompt`), its answers (`output`), or both."""
        asked = {**_numbered(version), "signals": signals, "note": note}
        return self._call("POST", f"{_path(name)}/drift/accept", json=asked)

    def moved_requests(self, name: str, version: int | None = None, format: str = "jsonl") -> bytes:
        """The captured requests since a version's change, as JSON lines or parquet."""
        return self._bytes(f"{_path(name)}/drift/requests", {"format": format, **_numbered(version)})

    def share(self, name: str, shared: bool = True) -> dict[str, Any]:
        """Let other tenants ask the adapter, or its own alone."""
        return self._call("POST", f"{_path(name)}/visibility", json={"visibility": _visibility(shared)})

    def remove(self, name: str, version: int | None = None, force: bool = False, *, why: str = "") -> dict[str, Any]:
        """Delete a version, or the adapter whole; what is live goes only with `force`."""
        path = _path(name) + (f"/versions/{version}" if version is not None else "")
        return self._call("DELETE", path, params=({"force": "true"} if force else {}) | _because(why))

    def create_key(self, name: str, tenant: str, scopes: Sequence[str], limits: Mapping[str, int]) -> dict[str, Any]:
        """A new API key; `secret` in the answer is told this once."""
        body = {"name": name, "tenant": tenant, "scopes": [*scopes], "limits": dict(limits)}
        return self._call("POST", "/v1/keys", json=body)

    def keys(self, tenant: str | None = None) -> dict[str, Any]:
        """Every key, or those of one tenant, the revoked too."""
        return self._call("GET", "/v1/keys", params={"tenant": tenant} if tenant else None)

    def revoke_key(self, id: str) -> dict[str, Any]:
        """The key opens nothing from now on."""
        return self._call("DELETE", f"/v1/keys/{_segment(id)}")

    def engines(self) -> dict[str, Any]:
        """Every engine: phase, model, load, memory."""
        return self._call("GET", "/v1/engines")

    def swap(self, name: str, model: str, *, force: bool = False, drain_first: bool = False) -> dict[str, Any]:
        """Put `model` under a base's name; answers when it serves, which takes as long as an engine's start."""
        body = {"model": model, "force": force, "drain_first": drain_first}
        return self._call("POST", f"/v1/engines/{_segment(name)}/swap", json=body, timeout=3600.0)

    def restart(self, name: str) -> dict[str, Any]:
        """Start an engine again that stayed down."""
        return self._call("POST", f"/v1/engines/{_segment(name)}/restart")

    def _bytes(self, path: str, params: Mapping[str, Any]) -> bytes:
        with self._translated(repeatable=True):
            response = self._http.get(path, params=params)
            if response.status_code != 200:
                self._read(response)
            return response.content

    def usage(self, month: str | None = None, tenant: str | None = None) -> dict[str, Any]:
        """What was used in a month (YYYY-MM; by default this one), by tenant and adapter."""
        params = {name: value for name, value in (("month", month), ("tenant", tenant)) if value is not None}
        return self._call("GET", "/v1/usage", params=params)

    def _call(self, method: str, path: str, **parts: Any) -> dict[str, Any]:
        return self._ask(lambda: self._http.request(method, path, **parts), repeatable=method == "GET")

    def _ask(self, send: Callable[[], httpx.Response], repeatable: bool) -> dict[str, Any]:
        for attempt in range(self._retry.attempts):
            last = attempt == self._retry.attempts - 1
            try:
                with self._translated(repeatable):
                    return self._read(send())
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


def adapter_files(path: str | Path) -> list[Path]:
    """What to send for `path`: the two files of a PEFT folder and its card, or the archive itself."""
    path = Path(path)
    if path.is_file():
        if path.name.endswith(ARCHIVES):
            return [path]
        raise ConfigError(f"{path} is a file; push the PEFT folder, or a {', '.join(ARCHIVES)} archive of it")
    if not path.is_dir():
        raise ConfigError(f"{path} does not exist; push a PEFT folder, or a {', '.join(ARCHIVES)} archive of it")
    weights = [path / PEFT_FILES[1]]
    if not weights[0].is_file():
        weights = sorted(path.glob(SHARDS)) or weights
    missing = [file.name for file in (path / PEFT_FILES[0], *weights) if not file.is_file()]
    if PEFT_FILES[1] in missing and (path / "adapter_model.bin").is_file():
        raise ConfigError(f"{path} holds a pickle (adapter_model.bin); save it again with safe_serialization=True")
    if missing:
        raise ConfigError(f"{path} is not a PEFT adapter: {' and '.join(missing)} not found in it")
    return [file for file in (path / PEFT_FILES[0], *weights, path / CARD) if file.is_file()]


def _because(why: str) -> dict[str, str]:
    return {"why": why} if why else {}


def _numbered(version: int | None) -> dict[str, int]:
    return {} if version is None else {"version": version}


def _visibility(shared: bool) -> str:
    return "shared" if shared else "private"


def _path(name: str) -> str:
    return f"/v1/adapters/{_segment(name)}"


def _segment(name: str) -> str:
    # A dot segment would be resolved away, and the rest of the path would be another route.
    if name in ("", ".", ".."):
        raise ConfigError(f"{name!r} is no name")
    return quote(name, safe="")


class _TryAgain(Exception):
    def __init__(self, error: LoradockError, after: float | None = None) -> None:
        super().__init__(str(error))
        self.error = error
        self.after = after


def _error(response: httpx.Response, body: dict[str, Any] | None, url: str) -> LoradockError:
    status = response.status_code
    error = body.get("error") if body is not None else None
    if not isinstance(error, dict) or not isinstance(error.get("message"), str):
        if status == EngineUnavailable.status:
            return EngineUnavailable(f"{url} answered 503: the server is not ready")
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
