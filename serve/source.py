"""An adapter that the server fetches itself: hf://, s3:// and file:// through fsspec, two known files and no more.

    hf://org/repo[@revision][/folder]     s3://bucket/prefix     file:///folder (below a configured root)

Who may push decides the address, so it is taken apart here and never handed to fsspec whole: no other scheme, no
chained URL, no query, no step upwards. Bytes are counted as they arrive.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import fsspec

from serve.adapter import CARD, CARD_BYTES, FILES, open_plain, shown
from serve.errors import AdapterRejected, BadRequest, Forbidden, LoradockError, TooLarge

SECONDS = 600.0
SCHEMES = ("hf", "s3", "file")

_CHUNK = 256 << 10
_PACKAGES = {"hf": "huggingface_hub", "s3": "s3fs"}
# How each says that nobody asks: otherwise both look for credentials in this server's environment.
_STRANGER: dict[str, dict[str, Any]] = {"hf": {"token": False}, "s3": {"anon": True}}
_FORM = {
    "hf": re.compile(r"(?P<at>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w.-]+)?(/[\w.-]+)*)/?", re.ASCII),
    "s3": re.compile(r"(?P<at>[a-z0-9][a-z0-9.-]{2,62}(/[\w.=+ -]+)*)/?", re.ASCII),
    "file": re.compile(r"(?P<at>/[^\0]*)"),
}
# hf://datasets/... and hf://spaces/... are other kinds of repositories.
_NOT_MODELS = ("datasets/", "spaces/", "buckets/", "kernels/")
_TAKEN = "hf://org/repo[@revision][/folder], s3://bucket/prefix or file:///folder"


@dataclass(frozen=True, slots=True)
class Source:
    """A place that was judged: its scheme and the path within it."""

    scheme: str
    path: str


def parse(source: str, roots: Iterable[Path] = ()) -> Source:
    """The place that `source` names; a folder of this machine must lie in one of `roots`."""
    scheme, there, path = source.partition("://")
    if not there or scheme not in SCHEMES:
        raise BadRequest(f"source `{shown(source)}` is not taken; this server fetches {_TAKEN}", param="source")
    form = _FORM[scheme].fullmatch(path)
    steps = path.split("@")[0].split("/") + path.split("/")
    if form is None or ".." in steps or "." in steps or (scheme == "hf" and path.startswith(_NOT_MODELS)):
        raise BadRequest(f"source `{shown(source)}` cannot be read; this server fetches {_TAKEN}", param="source")
    if scheme != "file":
        return Source(scheme, form["at"])
    # Judged where links lead, and opened there.
    real = Path(os.path.realpath(form["at"]))
    if not any(real.is_relative_to(Path(os.path.realpath(root))) for root in roots):
        raise Forbidden(
            f"source `{shown(source)}` lies in none of the source_roots that this key may name; "
            "push the files, or have it added"
        )
    return Source(scheme, str(real))


def fetch(source: Source, folder: Path, *, max_bytes: int, card: bool = False, anonymous: bool = False) -> None:
    """Bring the adapter's two files (and its card, if asked) into `folder`. Blocks: for a thread of its own.

    Where `anonymous`, without this server's credentials.
    """
    left, until = max_bytes, time.monotonic() + SECONDS
    with _translated(source):
        for name in FILES:
            with _open(source, name, anonymous) as remote, open(folder / name, "xb") as local:
                while chunk := remote.read(_CHUNK):
                    left -= len(chunk)
                    if left < 0:
                        raise TooLarge(f"this adapter is above the {max_bytes} bytes that this server takes")
                    if time.monotonic() > until:
                        raise BadRequest(f"the source took longer than {SECONDS:.0f} seconds; push the files instead")
                    local.write(chunk)
    if card:
        _fetch_card(source, folder, anonymous)


def _fetch_card(source: Source, folder: Path, anonymous: bool) -> None:
    try:
        with _translated(source), _open(source, CARD, anonymous) as remote:
            text = remote.read(CARD_BYTES)
    except AdapterRejected:
        return  # there is none
    (folder / CARD).write_bytes(text)


def _open(source: Source, name: str, anonymous: bool) -> BinaryIO:
    if source.scheme == "file":
        return open_plain(Path(source.path) / name)
    stranger = _STRANGER[source.scheme] if anonymous else {}
    system: Any = fsspec.filesystem(source.scheme, use_listings_cache=False, **stranger)
    return system.open(f"{source.path}/{name}", "rb", block_size=1 << 20, cache_type="readahead")


@contextmanager
def _translated(source: Source) -> Iterator[None]:
    place = shown(f"{source.scheme}://{source.path}")
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
        raise AdapterRejected(
            f"{place} has no {' and '.join(FILES)}, or cannot be seen from here; name the PEFT folder itself"
        ) from missing
    except PermissionError as refused:
        raise Forbidden(f"this server may not read {place}; give it the right, or push the files") from refused
    except OSError as failed:
        if failed.errno is not None:  # the local disk's own trouble, a full one for instance
            raise
        raise _unreachable(place, failed) from failed
    except Exception as failed:  # each filesystem has its own errors, and none of them is ours to know
        raise _unreachable(place, failed) from failed


def _unreachable(place: str, error: Exception) -> BadRequest:
    return BadRequest(f"{place} could not be fetched ({shown(error)}); try again, or push the files", param="source")
