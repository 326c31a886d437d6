"""Speaks the adapter and key API of a running server; for its errors see `serve.client.api_client`.

Repeating is safe for a push, because the server knows the bytes by their digest: it answers 200 instead of 201 when an
earlier attempt had arrived after all. Changes of a pointer are repeated only when the server cannot have seen them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from serve.client.api_client import ApiClient, Refused, Retry, Unreachable
from serve.client.upload_progress import CountedFile, Progress, UploadProgress
from serve.errors import ConfigError

__all__ = ["AdapterClient", "Refused", "Retry", "Unreachable", "adapter_files"]

PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")
SHARDS = "adapter_model-*-of-*.safetensors"
# What comes along, where it is there.
CARD, MANIFEST = "README.md", "manifest.json"
NOTES = (CARD, MANIFEST, "tokenizer.json", "tokenizer_config.json")
ARCHIVES = (".zip", ".tar.gz", ".tgz", ".tar.zst")
GGUF = ".gguf"


class AdapterClient(ApiClient):
    """Push, list, show, promote, roll back and remove adapters."""

    def push(
        self,
        name: str,
        path: str | Path,
        *,
        promote: bool = True,
        shared: bool | None = None,
        why: str = "",
        probe_min_effect: float | None = None,
        conversion_error: float | None = None,
        dry_run: bool = False,
        progress: Progress | None = None,
    ) -> dict[str, Any]:
        """Upload a PEFT folder or an archive of one; the files are read while they are sent.

        `shared` lets other tenants ask the adapter or stops them; None leaves that as it is, and a new one private.

        `probe_min_effect` is what the probe asks of this version, in the place of the server's setting, and
        `conversion_error` what making another kind a LoRA may leave out.

        With `dry_run` the server makes every check and keeps nothing.

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
                if conversion_error is not None:
                    fields["conversion_error"] = str(conversion_error)
                if dry_run:
                    fields["dry_run"] = "true"
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
        conversion_error: float | None = None,
        dry_run: bool = False,
    ) -> dict[str, Any]:
        """Have the server fetch an adapter from hf://, s3:// or a file:// that it allows; `shared` as in `push`."""
        body: dict[str, Any] = {"name": name, "source": source, "promote": promote} | _because(why)
        if probe_min_effect is not None:
            body["probe_min_effect"] = probe_min_effect
        if conversion_error is not None:
            body["conversion_error"] = conversion_error
        if dry_run:
            body["dry_run"] = True
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

    def download(self, name: str, version: int, file: str, target: Path) -> None:
        """One of a version's files, into `target`."""
        self._download(f"{_path(name)}/versions/{version}/files/{_segment(file)}", target)

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

    def rename(self, name: str, to: str, *, why: str = "") -> dict[str, Any]:
        """Give the adapter another name; the old one leads there until it is removed."""
        return self._call("POST", f"{_path(name)}/rename", json={"to": to} | _because(why))

    def pin(self, name: str, version: int | None = None) -> dict[str, Any]:
        """Keep `version` in the engine; without one, whichever is live."""
        return self._call("POST", f"{_path(name)}/pin", json={} if version is None else {"version": version})

    def unpin(self, name: str) -> dict[str, Any]:
        """Let the adapter's versions come and go again."""
        return self._call("DELETE", f"{_path(name)}/pin")

    def alias(self, name: str, alias: str, version: int, *, why: str = "") -> dict[str, Any]:
        """Point NAME@ALIAS at a version."""
        return self._call("PUT", f"{_path(name)}/aliases/{_segment(alias)}", json={"version": version} | _because(why))

    def unalias(self, name: str, alias: str, *, why: str = "") -> dict[str, Any]:
        """Remove an alias; its version stays."""
        return self._call("DELETE", f"{_path(name)}/aliases/{_segment(alias)}", params=_because(why))

    def tag(self, name: str, version: int, tags: Sequence[str], *, why: str = "") -> dict[str, Any]:
        """Write tags on a version, in the place of those that it has."""
        body = {"tags": [*tags]} | _because(why)
        return self._call("PUT", f"{_path(name)}/versions/{version}/tags", json=body)

    def build_baseline(
        self, name: str, prompts: Sequence[Any], version: int | None = None, max_tokens: int = 64
    ) -> dict[str, Any]:
        """Have a version answer these prompts, and hold its later traffic against that."""
        body = {"prompts": prompts, "max_tokens": max_tokens} | ({} if version is None else {"version": version})
        return self._call("POST", f"{_path(name)}/baseline", json=body)

    def replay(
        self, name: str, version: int, requests: int, max_tokens: int, against: str, examples: int
    ) -> dict[str, Any]:
        """Have a version answer captured requests, and compare what it says."""
        body = {"requests": requests, "max_tokens": max_tokens, "against": against, "examples": examples}
        return self._call("POST", f"{_path(name)}/versions/{version}/replay", json=body)

    def save_baseline(self, name: str, version: int | None = None) -> bytes:
        """A version's baseline, as it is shipped."""
        return self._bytes(f"{_path(name)}/baseline", _numbered(version))

    def ship_baseline(self, name: str, data: bytes, version: int | None = None) -> dict[str, Any]:
        """Hold a version against a baseline that was saved."""
        return self._call("PUT", f"{_path(name)}/baseline", params=_numbered(version), content=data)

    def put_golden(self, name: str, document: Mapping[str, Any]) -> dict[str, Any]:
        """Keep a golden set, `{"cases": [...]}`, in the place of an earlier one."""
        return self._call("PUT", f"{_path(name)}/golden", json=dict(document))

    def golden_sets(self) -> dict[str, Any]:
        """The golden sets of the adapters that this key may change, without their cases."""
        return self._call("GET", "/v1/golden")

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

    def drift_everywhere(self) -> dict[str, Any]:
        """What moved, of every adapter that this key may change."""
        return self._call("GET", "/v1/drift")

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

    def usage(self, month: str | None = None, tenant: str | None = None) -> dict[str, Any]:
        """What was used in a month (YYYY-MM; by default this one), by tenant and adapter."""
        params = {name: value for name, value in (("month", month), ("tenant", tenant)) if value is not None}
        return self._call("GET", "/v1/usage", params=params)


def adapter_files(path: str | Path) -> list[Path]:
    """What to send for `path`: the two files of a PEFT folder and its notes, or the archive itself."""
    path = Path(path)
    if path.is_file():
        if path.name.endswith((*ARCHIVES, GGUF)):
            return [path]
        raise ConfigError(
            f"{path} is a file; push the PEFT folder, a {', '.join(ARCHIVES)} archive of it, or an adapter's {GGUF}"
        )
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
    return [file for file in (path / PEFT_FILES[0], *weights, *(path / note for note in NOTES)) if file.is_file()]


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
