"""Adapter bytes under their sha256: written aside, fsynced, renamed. What has a digest is whole.

A server that shares its registry with others also puts them where all see them (serve.adapters.shared_store), and
pulls from there what it lacks.

    root/quarantine/<random>/   what strangers sent, until it is judged; gone when its `with` ends
    root/blobs/<digest>/        exactly adapter_config.json and adapter_model.safetensors; never written again

One process owns a root. `hold()` joins "the bytes are here" to "the registry says so": admit and add under it, and a
removal cannot come between.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import re
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from serve.adapters.adapter import FILES
from serve.adapters.byte_ledger import ByteLedger, Kind, Room
from serve.adapters.file_thread import rest
from serve.adapters.shared_store import SharedStore
from serve.adapters.untrusted import open_plain
from serve.errors import AdapterRejected, EngineUnavailable, NotFound, OutOfSpace
from serve.files import digest as digest_of
from serve.files import fsync, rename
from serve.names import DEFAULT

log = logging.getLogger(__name__)

_DIGEST = re.compile(r"[0-9a-f]{64}")
_CHUNK = 1 << 20
SHARED_THREADS = 4
# So long a request waits for bytes from the shared folder (they go on coming), and a push for it to take them.
DOWNLOAD_SECONDS, UPLOAD_SECONDS = 30.0, 300.0


@dataclass(frozen=True, slots=True)
class Sweep:
    """What a start found: leftovers removed, unknown or damaged blobs removed, known digests whose bytes are gone."""

    leftovers: int
    removed: frozenset[str]
    missing: frozenset[str]


class Store:
    """SharedStore under `root`; `reserve` is what the disk must keep free, and `ledger` has whose the bytes on it are.

    `shared` is where other servers find them too.
    """

    def __init__(self, root: Path, *, reserve: int = 256 << 20, shared: SharedStore | None = None) -> None:
        self.shared = shared
        # A shared folder that is slow takes these threads and nobody else's.
        self._downloads = ThreadPoolExecutor(SHARED_THREADS, "shared-download")
        self._uploads = ThreadPoolExecutor(SHARED_THREADS, "shared-upload")
        # By digest: whoever lacks the same bytes waits for the same download.
        self._downloading: dict[str, asyncio.Task[None]] = {}
        # How many are about to register each digest: its bytes stay meanwhile.
        self._kept: Counter[str] = Counter()
        self._counting = threading.Lock()
        self.root = Path(root).absolute()
        self.ledger = ByteLedger(self.root, reserve=reserve)
        self._blobs = self.root / "blobs"
        self._quarantine = self.root / "quarantine"
        self._lock = threading.RLock()
        with _space():
            for folder in (self.root, self._blobs, self._quarantine):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    @contextmanager
    def quarantine(self, room: Room | None = None) -> Iterator[Path]:
        """A fresh private folder, removed at the end whatever happens; a full disk inside it is OutOfSpace.

        `room` is for what a tenant sends; without it the server's operator pays.
        """
        if room is None:
            self.ledger.check(DEFAULT, Kind.UPLOADS)
        with _space():
            folder = Path(tempfile.mkdtemp(dir=self._quarantine))
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """While it lasts no blob is removed by another thread."""
        with self._lock:
            yield

    def admit(self, folder: Path, *, keep: bool = False) -> str:
        """Keep the two files of `folder` and answer their digest; the same bytes twice are one blob.

        A folder in quarantine gives its files away; any other is copied. With `keep` nobody removes them before
        `release` is called.
        """
        with _space():
            staged = Path(tempfile.mkdtemp(dir=self._quarantine))
            try:
                give = self._quarantine in Path(folder).absolute().parents
                digest = _stage(Path(folder), staged, give=give)
                with self._lock:
                    self._settle(staged, digest)
                    if keep:
                        with self._counting:
                            self._kept[digest] += 1
                return digest
            finally:
                shutil.rmtree(staged, ignore_errors=True)

    def release(self, digest: str) -> None:
        """The bytes are registered, or not wanted: once for each `admit` with `keep`."""
        with self._counting:
            self._kept[digest] -= 1
            self._kept += Counter()  # forgets those at zero

    def path(self, digest: str) -> Path:
        """The folder of a blob, for an engine to read."""
        folder = self._folder(digest)
        if not folder.is_dir():
            raise NotFound(f"no adapter bytes are kept under {digest}")
        with suppress(OSError):
            os.utime(folder)  # it is used: see `unused`
        return folder

    def has(self, digest: str) -> bool:
        """The bytes are on this machine."""
        return self._folder(digest).is_dir()

    def unused(self, seconds: float) -> set[str]:
        """The blobs that no engine was given for so long."""
        before = time.time() - seconds
        with os.scandir(self._blobs) as entries:
            return {entry.name for entry in entries if entry.stat().st_mtime < before}

    def evict(self, digest: str, seconds: float) -> bool:
        """Forget a blob that all servers see and no engine was given for so long; whether it is forgotten."""
        if self.shared is None or not self.shared.has(digest):
            return False  # it is from before there were others
        return self.remove(digest, unless=lambda digest: digest not in self.unused(seconds))

    async def bring(self, digest: str) -> Path:
        """As `path`; pulled from where all servers share them first, if they are not here."""
        if self.shared is None or self.has(digest):
            return self.path(digest)
        if digest not in self._downloading:
            task = asyncio.create_task(_in(self._downloads, self._pull, self.shared, digest))
            self._downloading[digest] = task
            task.add_done_callback(lambda task: self._downloaded(digest, task))
        await _within(
            DOWNLOAD_SECONDS, asyncio.shield(self._downloading[digest]), f"adapter {digest[:12]} has not come"
        )
        return self.path(digest)

    async def upload(self, digest: str) -> None:
        """`publish`, off the event loop and not for ever."""
        if self.shared is not None:
            uploading = _in(self._uploads, self.publish, digest)
            await _within(UPLOAD_SECONDS, uploading, f"the shared folder did not take {digest[:12]}")

    async def sweep_shared(self, known: Collection[str]) -> None:
        """Remove what no version names from where all servers see it."""
        if self.shared is not None:
            await _in(self._uploads, self.shared.sweep, known)

    def close(self) -> None:
        """Wait for no download or upload."""
        for threads in (self._downloads, self._uploads):
            threads.shutdown(wait=False, cancel_futures=True)

    def publish(self, digest: str) -> None:
        """Put the bytes where all servers see them, if there are others."""
        if self.shared is not None:
            self.shared.put(digest, self.path(digest))

    def _downloaded(self, digest: str, task: asyncio.Task[None]) -> None:
        self._downloading.pop(digest, None)
        if not task.cancelled():
            task.exception()  # whoever still waits has it

    def _pull(self, shared: SharedStore, digest: str) -> None:
        with self.quarantine() as folder:
            if self.has(digest):
                return
            shared.get(digest, folder)
            if (admitted := self.admit(folder)) != digest:
                self.remove(admitted)
                raise EngineUnavailable(f"the shared bytes of {digest[:12]} are damaged: push that version again")

    def place(self, digest: str) -> Path:
        """Where a blob lies, without a look at the disk: for one that an engine holds already."""
        return self._folder(digest)

    def remove(self, digest: str, *, unless: Callable[[str], bool] | None = None) -> bool:
        """Forget a blob, and say whether it was there; `unless` is asked when nobody can be admitting it."""
        with self._lock, _space():
            folder = self._folder(digest)
            if not folder.is_dir() or self._kept[digest] or (unless is not None and unless(digest)):
                return False
            # Renamed away first: what lies under a digest is whole or absent, also after a kill in mid-removal.
            doomed = Path(tempfile.mkdtemp(dir=self._quarantine))
            rename(folder, doomed / digest)
            shutil.rmtree(doomed, ignore_errors=True)
            return True

    def digests(self) -> set[str]:
        """What is kept."""
        return {entry.name for entry in os.scandir(self._blobs) if _DIGEST.fullmatch(entry.name)}

    def verify(self, digest: str) -> bool:
        """Read a blob again: are these still the bytes that its name promises?"""
        try:
            return _digest(self.path(digest)) == digest
        except (AdapterRejected, NotFound):
            return False

    def sweep(self, known: set[str]) -> Sweep:
        """At start: quarantine leftovers go, and so do blobs that nobody knows or that lack a file."""
        with self._lock:
            leftovers = 0
            for entry in os.scandir(self._quarantine):
                leftovers += 1
                _erase(Path(entry.path))
            removed = set()
            for entry in os.scandir(self._blobs):
                whole = all((Path(entry.path) / name).is_file() for name in FILES)
                if entry.name not in known or not whole:
                    removed.add(entry.name)
                    _erase(Path(entry.path))
            fsync(self._blobs)
            return Sweep(leftovers, frozenset(removed), frozenset(known - self.digests()))

    def _settle(self, staged: Path, digest: str) -> None:
        target = self._blobs / digest
        if target.is_dir():
            fsync(self._blobs)  # whoever renamed it may not have come this far yet
            return
        try:
            rename(staged, target)
        except OSError as taken:
            # Another process was first with the same bytes.
            if taken.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            fsync(self._blobs)

    def _folder(self, digest: str) -> Path:
        # Also what keeps a digest from being a path.
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise NotFound("that is not a digest: 64 hexadecimal digits are")
        return self._blobs / digest


async def _in(threads: ThreadPoolExecutor, call: Callable[..., Any], *args: Any) -> None:
    await asyncio.get_running_loop().run_in_executor(threads, partial(call, *args))


async def _within(seconds: float, job: Awaitable[None], problem: str) -> None:
    """EngineUnavailable, if the job takes longer."""
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            await job
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise EngineUnavailable(f"{problem} within {seconds:g} s: retry shortly") from error


def _stage(folder: Path, staged: Path, *, give: bool) -> str:
    """Bring the two files into `staged`, on the disk for good, and hash them."""
    if not give:
        for name in FILES:
            with open_plain(folder / name) as source, _create(staged / name) as copy:
                shutil.copyfileobj(source, copy, _CHUNK)
    else:
        for name in FILES:
            with open_plain(folder / name):
                os.rename(folder / name, staged / name)
    for name in FILES:
        os.chmod(staged / name, 0o600)
        fsync(staged / name)
    digest = _digest(staged)
    fsync(staged)
    return digest


def _digest(folder: Path) -> str:
    """Of its files in name order (serve.files)."""
    with ExitStack() as opened:
        return digest_of([(name, opened.enter_context(open_plain(folder / name))) for name in sorted(FILES)], rest)


def _create(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")


def _erase(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _space() -> Iterator[None]:
    try:
        yield
    except OSError as wrong:
        if wrong.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutOfSpace("the disk is full; delete adapters or make room, then send it again") from wrong
        log.exception("the store failed")
        reason = wrong.strerror or type(wrong).__name__
        raise EngineUnavailable(
            f"adapters cannot be kept or read now ({reason}): an operator must see to it"
        ) from wrong
