"""An adapter that the server fetches itself from an address: its two known files and their notes, and no more.

hf:// and s3:// are read through fsspec, https:// and file:// here, the others in `serve.adapters.sources`. Bytes are
counted as they arrive.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec

from serve.adapters.adapter import CONFIG, NOTES, WEIGHTS
from serve.adapters.byte_ledger import Kind, Room
from serve.adapters.file_thread import take_turn
from serve.adapters.shards import INDEX, join, names_in
from serve.adapters.sources import client_process, oci, transfer
from serve.adapters.sources.address import Source, folder_of
from serve.adapters.sources.kind import offered
from serve.adapters.sources.transfer import Body, Transfer, checked_status, translated
from serve.adapters.untrusted import open_plain
from serve.errors import AdapterRejected, LoradockError

_INDEX_BYTES = 1 << 20
_PACKAGES = {"hf": "huggingface_hub", "s3": "s3fs"}
# How each says that nobody asks: otherwise both look for credentials in this server's environment.
_STRANGER: dict[str, dict[str, Any]] = {"hf": {"token": False}, "s3": {"anon": True}}
# The hub streams a file; object storage is read in ranges.
_READING: dict[str, dict[str, Any]] = {
    "hf": {"block_size": 0, "cache_type": "none"},
    "s3": {"block_size": 1 << 20, "cache_type": "readahead"},
}


def fetch(source: Source, folder: Path, room: Room | None = None, *, max_bytes: int, anonymous: bool = False) -> Source:
    """Bring the adapter's two files and its notes into `folder`. Blocks: for a thread of its own.

    Each byte is taken from the `room` before it is written. Where `anonymous`, without this server's credentials.
    The answer is where they came from: of an address that moves,
    the version that was read.
    """
    files = Transfer(folder, max_bytes, room)
    if source.scheme == "oci":
        came = oci.bring(source, files)
    elif source.scheme in client_process.PROGRAMS:
        came = client_process.bring(source, files)
        if came.scheme == "file":  # a store of files on this machine
            _bring(folder_of(came), files, anonymous)
            came = replace(source, version=came.version)
    elif kind := offered().get(source.scheme):
        with translated(source):
            came = kind.bring(source, files)
    else:
        came = _bring(source, files, anonymous)
    take_turn(join, folder, *([room.beside(Kind.UNPACKED).take] if room else []))
    return came


def _bring(source: Source, files: Transfer, anonymous: bool) -> Source:
    with translated(source, _PACKAGES.get(source.scheme, "")):
        came = _pinned(source, anonymous) if source.scheme == "hf" else source
        system = _system(source.scheme, anonymous)

    def copy(name: str) -> None:
        with translated(source), _open(system, came, name) as remote:
            files.copy(remote, name)

    copy(CONFIG)
    try:
        copy(WEIGHTS)
    except AdapterRejected as absent:
        for name in _shards(system, source, came, files, absent):
            copy(name)
    for name in NOTES:
        try:
            with translated(source), _open(system, came, name) as remote:
                text = remote.read(NOTES[name])
        except LoradockError:
            continue  # there is none, or none to be seen
        (files.folder / name).write_bytes(text)
    return came


def _shards(system: Any, source: Source, came: Source, files: Transfer, absent: AdapterRejected) -> list[str]:
    """The files of weights that an index names; `absent`, which says that there is no single file, without one."""
    try:
        with translated(source), _open(system, came, INDEX) as remote:
            index = remote.read(_INDEX_BYTES)
    except AdapterRejected:
        raise absent from None
    (files.folder / WEIGHTS).unlink(missing_ok=True)
    return names_in(index)


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
    return replace(source, path="/".join((owner, f"{repo}@{model.sha}", *folder)), version=model.sha or "")


def _open(system: Any, source: Source, name: str) -> AbstractContextManager[Any]:
    if source.scheme == "file":
        return open_plain(Path(source.path) / name, real=True)
    if source.scheme == "https":
        return _https(f"https://{source.path}/{name}")
    return system.open(f"{source.path}/{name}", "rb", **_READING[source.scheme])


@contextmanager
def _https(url: str) -> Iterator[Body]:
    """A file of a host that may be named."""
    with transfer.http_client() as client, client.stream("GET", url) as answer:
        checked_status(answer)
        yield Body(answer)
