"""An adapter that the server fetches itself, two known files and no more: hf:// and s3:// through fsspec, https://, file://.

    hf://org/repo[@revision][/folder]     s3://bucket/prefix
    https://host/folder (a configured host)     file:///folder (below a configured root)

Who may push decides the address, so it is taken apart here and never handed to fsspec whole: no other scheme, no
chained URL, no query, no step upwards. Bytes are counted as they arrive.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import httpx

from serve.adapters.adapter import ABSENT, CARD, CARD_BYTES, CONFIG, FILES, WEIGHTS
from serve.adapters.shards import INDEX, join, names_in
from serve.adapters.untrusted import open_plain
from serve.errors import AdapterRejected, BadRequest, Forbidden, LoradockError, TooLarge
from serve.names import shown

SECONDS = 600.0
SCHEMES = ("hf", "s3", "https", "file")

_CHUNK = 256 << 10
_INDEX_BYTES = 1 << 20
_HTTPS_SECONDS = 30.0  # without a byte
_PACKAGES = {"hf": "huggingface_hub", "s3": "s3fs"}
# How each says that nobody asks: otherwise both look for credentials in this server's environment.
_STRANGER: dict[str, dict[str, Any]] = {"hf": {"token": False}, "s3": {"anon": True}}
# The hub streams a file; object storage is read in ranges.
_READING: dict[str, dict[str, Any]] = {
    "hf": {"block_size": 0, "cache_type": "none"},
    "s3": {"block_size": 1 << 20, "cache_type": "readahead"},
}
_FORM = {
    "hf": re.compile(r"(?P<at>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w.-]+)?(/[\w.-]+)*)/?", re.ASCII),
    "s3": re.compile(r"(?P<at>[a-z0-9][a-z0-9.-]{2,62}(/[\w.=+ -]+)*)/?", re.ASCII),
    "https": re.compile(r"(?P<at>[a-z0-9][a-z0-9.-]*(:[0-9]{1,5})?(/[\w.=+~-]+)+)/?", re.ASCII),
    "file": re.compile(r"(?P<at>/[^\0]*)"),
}
# hf://datasets/... and hf://spaces/... are other kinds of repositories.
_NOT_MODELS = ("datasets/", "spaces/", "buckets/", "kernels/")
_TAKEN = "hf://org/repo[@revision][/folder], s3://bucket/prefix, https://host/folder or file:///folder"
# A path of vLLM's runtime LoRA API that names a repository of the hub.
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Source:
    """A place that was judged: its scheme and the path within it; of a hub, the commit that is read.

    `address` is how whoever asked spells it, for errors: a folder's real path is none of theirs.
    """

    scheme: str
    path: str
    commit: str = ""
    address: str = field(default="", compare=False)

    @property
    def shown(self) -> str:
        return shown(self.address or f"{self.scheme}://{self.path}")


def address_of(path: str) -> str:
    """What vLLM calls a LoRA path, as an address: a folder, ORG/REPO of the hub, or an address already."""
    if "://" in path:
        return path
    if path.startswith("/"):
        return f"file://{path}"
    if _HUB_NAME.fullmatch(path):
        return f"hf://{path}"
    raise BadRequest(
        f"`{shown(path)}` is no path that this server takes: send a folder's absolute path, org/repo or {_TAKEN}"
    )


def parse(source: str, roots: Iterable[Path] = (), hosts: Iterable[str] = ()) -> Source:
    """The place that `source` names; a folder of this machine must lie in one of `roots`, an https host in `hosts`."""
    scheme, there, path = source.partition("://")
    if not there or scheme not in SCHEMES:
        raise BadRequest(f"source `{shown(source)}` is not taken; this server fetches {_TAKEN}", param="source")
    form = _FORM[scheme].fullmatch(path)
    steps = path.split("@")[0].split("/") + path.split("/")
    if form is None or ".." in steps or "." in steps or (scheme == "hf" and path.startswith(_NOT_MODELS)):
        raise BadRequest(f"source `{shown(source)}` cannot be read; this server fetches {_TAKEN}", param="source")
    if scheme == "https" and form["at"].partition("/")[0] not in {host.lower() for host in hosts}:
        raise BadRequest(
            f"source `{shown(source)}` is on none of the source_hosts that this key may name; "
            "push the files, or have the host added (LORADOCK_SOURCE_HOSTS; for tenant default alone)",
            param="source",
        )
    if scheme != "file":
        return Source(scheme, form["at"], address=source)
    # Judged where links lead, and opened there.
    real = Path(os.path.realpath(form["at"]))
    if not any(real.is_relative_to(Path(os.path.realpath(root))) for root in roots):
        raise Forbidden(
            f"source `{shown(source)}` lies in none of the source_roots that this key may name; "
            "push the files, or have its folder added (LORADOCK_SOURCE_ROOTS; for tenant default alone)"
        )
    return Source(scheme, str(real), address=source)


def fetch(source: Source, folder: Path, *, max_bytes: int, card: bool = False, anonymous: bool = False) -> Source:
    """Bring the adapter's two files (and its card, if asked) into `folder`. Blocks: for a thread of its own.

    Where `anonymous`, without this server's credentials. The answer is where they came from: on a hub, whose branches
    and tags move, the commit that was read.
    """
    with _translated(source):
        came = _pinned(source, anonymous) if source.scheme == "hf" else source
        system = _system(source.scheme, anonymous)
    download = _Download(system, source, came, folder, max_bytes)
    download.file(CONFIG)
    try:
        download.file(WEIGHTS)
    except AdapterRejected as absent:
        for name in download.shards(absent):
            download.file(name)
    join(folder)
    if card:
        _fetch_card(system, came, folder)
    return came


class _Download:
    """Files of one source into a folder, so many bytes and seconds in all."""

    def __init__(self, system: Any, asked: Source, source: Source, folder: Path, max_bytes: int) -> None:
        self._system, self._asked, self._source, self._folder = system, asked, source, folder
        self._left = self._max_bytes = max_bytes
        self._until = time.monotonic() + SECONDS

    def file(self, name: str) -> None:
        local = self._folder / name
        with _translated(self._asked), _open(self._system, self._source, name) as remote, open(local, "xb") as file:
            while chunk := remote.read(_CHUNK):
                self._left -= len(chunk)
                if self._left < 0:
                    raise TooLarge(f"this adapter is above the {self._max_bytes} bytes that this server takes")
                if time.monotonic() > self._until:
                    raise BadRequest(f"the source took longer than {SECONDS:.0f} seconds; push the files instead")
                file.write(chunk)

    def shards(self, absent: AdapterRejected) -> list[str]:
        """The files of weights that an index names; `absent`, which says that there is no single file, without one."""
        try:
            with _translated(self._asked), _open(self._system, self._source, INDEX) as remote:
                index = remote.read(_INDEX_BYTES)
        except AdapterRejected:
            raise absent from None
        (self._folder / WEIGHTS).unlink(missing_ok=True)
        return names_in(index)


def _fetch_card(system: Any, source: Source, folder: Path) -> None:
    try:
        with _translated(source), _open(system, source, CARD) as remote:
            text = remote.read(CARD_BYTES)
    except AdapterRejected:
        return  # there is none
    (folder / CARD).write_bytes(text)


def _system(scheme: str, anonymous: bool) -> Any:
    """A file system that remembers nothing of earlier pushes: what is there may have changed since."""
    if scheme in ("file", "https"):
        return None
    stranger = _STRANGER[scheme] if anonymous else {}
    return fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=True, **stranger)


def _pinned(source: Source, anonymous: bool) -> Source:
    """The commit that a revision names now: a push to the hub in between would give config and weights of two."""
    from huggingface_hub import HfApi

    owner, repo, *folder = source.path.split("/")
    repo, _, revision = repo.partition("@")
    model = HfApi(**_STRANGER["hf"] if anonymous else {}).model_info(f"{owner}/{repo}", revision=revision or None)
    return Source("hf", "/".join((owner, f"{repo}@{model.sha}", *folder)), model.sha or "", source.address)


def _open(system: Any, source: Source, name: str) -> AbstractContextManager[Any]:
    if source.scheme == "file":
        return open_plain(Path(source.path) / name, real=True)
    if source.scheme == "https":
        return _https(f"https://{source.path}/{name}")
    return system.open(f"{source.path}/{name}", "rb", **_READING[source.scheme])


class _Body:
    """The body of an answer, read as a file."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = b""

    def read(self, size: int) -> bytes:
        while len(self._rest) < size and (chunk := next(self._chunks, b"")):
            self._rest += chunk
        data, self._rest = self._rest[:size], self._rest[size:]
        return data


@contextmanager
def _https(url: str) -> Iterator[_Body]:
    """A file of a host that may be named. A redirect is not followed: it leads to a host that nobody judged."""
    with _client() as client, client.stream("GET", url, headers={"accept-encoding": "identity"}) as answer:
        if answer.status_code in (404, 410):
            raise FileNotFoundError(url)
        if answer.status_code in (401, 403):
            raise PermissionError(url)
        if answer.status_code != 200:
            raise ConnectionError(f"status {answer.status_code} {answer.reason_phrase}")
        yield _Body(answer.iter_raw(_CHUNK))


def _client() -> httpx.Client:
    return httpx.Client(follow_redirects=False, timeout=_HTTPS_SECONDS)


@contextmanager
def _translated(source: Source) -> Iterator[None]:
    place = source.shown
    try:
        yield
    except LoradockError:
        raise
    except ImportError as missing:
        package = _PACKAGES.get(source.scheme, source.scheme)
        raise BadRequest(
            f"this server cannot fetch {source.scheme}:// because {package} is not installed; install it, or push files"
        ) from missing
    except FileNotFoundError as missing:
        raise _absent(place) from missing
    except PermissionError as refused:
        raise _forbidden(place) from refused
    except OSError as failed:
        # The hub answers a stranger 401 for what is private and for what is not there.
        status = getattr(getattr(failed, "response", None), "status_code", None)
        if status in (401, 404):
            raise _absent(place) from failed
        if status == 403:
            raise _forbidden(place) from failed
        if failed.errno is not None:  # the local disk's own trouble, a full one for instance
            raise
        raise _unreachable(place, failed) from failed
    except Exception as failed:  # each filesystem has its own errors, and none of them is ours to know
        raise _unreachable(place, failed) from failed


def _absent(place: str) -> AdapterRejected:
    files = " and ".join(FILES)
    return AdapterRejected(
        f"{place} has no {files}, or cannot be seen from here; name the PEFT folder itself", code=ABSENT
    )


def _forbidden(place: str) -> Forbidden:
    return Forbidden(f"this server may not read {place}; give it the right, or push the files")


def _unreachable(place: str, error: Exception) -> BadRequest:
    return BadRequest(f"{place} could not be fetched ({shown(error)}); try again, or push the files", param="source")
