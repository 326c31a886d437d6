"""Files of one source on their way into a folder: so many bytes and seconds in all, and how a failure is told."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import httpx

from serve.adapters.adapter import ABSENT, FILES
from serve.adapters.byte_ledger import Room
from serve.adapters.sources.address import Source
from serve.errors import AdapterRejected, BadRequest, Forbidden, LoradockError, TooLarge
from serve.names import shown

SECONDS = 600.0
CHUNK = 256 << 10
_HTTP_SECONDS = 30.0  # without a byte


class Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


class Transfer:
    """`room` is what the tenant's ledger has for them."""

    def __init__(self, folder: Path, max_bytes: int, room: Room | None = None) -> None:
        self.folder, self.room = folder, room
        self._left = self.max_bytes = max_bytes
        self._until = time.monotonic() + SECONDS

    def copy(self, remote: Readable, name: str, heard: Callable[[bytes], object] = lambda chunk: None) -> None:
        """All of `remote` as the file `name`; `heard` is given each piece of it."""
        with open(self.folder / name, "xb") as file:
            while chunk := remote.read(CHUNK):
                self.took(len(chunk))
                heard(chunk)
                file.write(chunk)

    def took(self, nbytes: int) -> None:
        """So many bytes came; TooLarge above the limit, BadRequest when the time is over."""
        self._left -= nbytes
        self.check(0)
        if self.room is not None:
            self.room.take(nbytes)

    def check(self, more: int) -> None:
        """As `took`, of bytes that are announced."""
        if self._left < more:
            raise self.too_large()
        _check_time(self._until)

    def too_large(self) -> TooLarge:
        return TooLarge(f"this adapter is above the {self.max_bytes} bytes that this server takes")


class Body:
    """The body of an HTTP answer, read as a file; it gets so many seconds however slowly it comes."""

    def __init__(self, answer: httpx.Response) -> None:
        self._chunks: Iterator[bytes] = answer.iter_raw()
        self._rest = bytearray()
        self._until = time.monotonic() + SECONDS

    def read(self, size: int, /) -> bytes:
        while len(self._rest) < size and (chunk := next(self._chunks, b"")):
            self._rest += chunk
            _check_time(self._until)
        data = bytes(self._rest[:size])
        del self._rest[:size]
        return data


def _check_time(until: float) -> None:
    if time.monotonic() > until:
        raise BadRequest(f"the source took longer than {SECONDS:.0f} seconds; push the files instead")


def http_client() -> httpx.Client:
    """A redirect is not followed by itself: it may lead to a host that nobody judged."""
    return httpx.Client(follow_redirects=False, timeout=_HTTP_SECONDS, headers={"accept-encoding": "identity"})


def checked_status(answer: httpx.Response) -> None:
    """The errors of an answer that is no 200, as those of a file system."""
    if answer.status_code in (404, 410):
        raise FileNotFoundError(str(answer.url))
    if answer.status_code in (401, 403):
        raise PermissionError(str(answer.url))
    if answer.status_code != 200:
        raise ConnectionError(f"status {answer.status_code} {answer.reason_phrase}")


@contextmanager
def translated(source: Source, package: str = "") -> Iterator[None]:
    """A source's errors, under our names; `package` is what must be installed to read it."""
    place = source.shown
    try:
        yield
    except LoradockError:
        raise
    except ImportError as missing:
        raise not_installed(source, package or source.scheme) from missing
    except FileNotFoundError as missing:
        raise absent(place) from missing
    except PermissionError as refused:
        raise forbidden(place) from refused
    except OSError as failed:
        # The hub answers a stranger 401 for what is private and for what is not there.
        status = getattr(getattr(failed, "response", None), "status_code", None)
        if status in (401, 404):
            raise absent(place) from failed
        if status == 403:
            raise forbidden(place) from failed
        if failed.errno is not None:  # the local disk's own trouble, a full one for instance
            raise
        raise unreachable(place, failed) from failed
    except Exception as failed:  # each filesystem has its own errors, and none of them is ours to know
        raise unreachable(place, failed) from failed


def absent(place: str) -> AdapterRejected:
    files = " and ".join(FILES)
    return AdapterRejected(
        f"{place} has no {files}, or cannot be seen from here; name the PEFT folder itself", code=ABSENT
    )


def forbidden(place: str) -> Forbidden:
    return Forbidden(f"this server may not read {place}; give it the right, or push the files")


def unreachable(place: str, error: Any) -> BadRequest:
    return BadRequest(f"{place} could not be fetched ({shown(error)}); try again, or push the files", param="source")


def not_installed(source: Source, package: str) -> BadRequest:
    return BadRequest(
        f"this server cannot fetch {source.scheme}:// because {package} is not installed; install it, or push files"
    )
