"""Files of tenants: what clients send for batches and fine-tuning, and what the server writes for them."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import IO

from fastapi.concurrency import contextmanager_in_threadpool

from serve.adapters.byte_ledger import Bound, Kind, Room
from serve.adapters.registry.registry import Registry
from serve.adapters.store import Store
from serve.adapters.untrusted import write
from serve.auth.auth import Caller
from serve.errors import BadRequest, NotFound
from serve.jobs.batches.file_bytes import FileBytes
from serve.jobs.batches.file_rows import FileRows
from serve.jobs.batches.json_lines import check_objects
from serve.jobs.batches.objects import EXAMPLES, SENT, Limits, StoredFile
from serve.jobs.batches.upload import FRAMING, LINES, receive, too_large
from serve.names import shown

# An expiry that a client may choose, in seconds: an hour to 30 days, as OpenAI's.
EXPIRY = range(3600, 30 * 86_400 + 1)


class Files:
    """Bytes in `contents`, rows in `rows`, both within `limits`."""

    def __init__(
        self, registry: Registry, store: Store, limits: Limits, clock: Callable[[], float] = time.time
    ) -> None:
        self.limits = limits
        self.contents = FileBytes(store.root / "files", store.shared)
        self.rows = FileRows(registry, limits, clock)
        self.ledger = store.ledger
        self.ledger.counts(Kind.FILES, self.rows.kept)
        self.ledger.bound(_bound(limits.tenant_bytes))
        self._clock = clock

    async def upload(self, caller: Caller, stream: AsyncIterator[bytes], content_type: str, stated: int) -> StoredFile:
        """Keep a file that arrives as a form; `stated` is how many bytes the client says are coming."""
        limits = self.limits
        if stated > limits.file_bytes + FRAMING:
            raise too_large(limits.file_bytes)
        await asyncio.to_thread(self.rows.check_count, caller.tenant)
        async with self._incoming(caller.tenant, max(0, stated - FRAMING)) as (path, sink, room):
            lines = max(LINES, limits.lines)
            form = await receive(stream, content_type, sink, room, max_bytes=limits.file_bytes, max_lines=lines)
            if (purpose := form.fields.get("purpose")) not in SENT:
                raise BadRequest(f"purpose takes `batch` or `fine-tune` here, not {shown(purpose)}", param="purpose")
            sink.flush()
            if purpose == EXAMPLES:
                await asyncio.to_thread(check_objects, path)
            now = self._clock()
            expires = now + _expiry(form.fields, limits.file_seconds)
            id = f"file-{secrets.token_hex(12)}"
            file = StoredFile(id, caller.tenant, caller.name, purpose, form.filename, form.nbytes, now, expires)
            await asyncio.to_thread(self._keep, file, path)
        return file

    @asynccontextmanager
    async def _incoming(self, tenant: str, stated: int) -> AsyncIterator[tuple[Path, IO[bytes], Room]]:
        """A private file, and room for so many bytes of it at once."""
        with self.ledger.room(tenant, Kind.FILES) as room:
            await asyncio.to_thread(room.expect, stated)
            async with contextmanager_in_threadpool(self.contents.incoming()) as (path, sink):
                yield path, sink, room

    def written(self, caller: Caller, filename: str, data: bytes) -> StoredFile:
        """Keep examples that this server made for a tenant, as if the caller had sent them. Blocks."""
        return self._examples(caller, f"file-{secrets.token_hex(12)}", filename, len(data), [data])

    def _keep(self, file: StoredFile, path: Path) -> None:
        self.contents.keep(file.id, path)
        try:
            self.rows.add(file)
        except BaseException:
            self.contents.remove(file.id)
            raise

    def adopt(self, caller: Caller, path: Path, filename: str) -> StoredFile:
        """A file of examples that this server wrote for a tenant; the same bytes are the same file. Blocks."""
        with path.open("rb") as source:
            digest = hashlib.file_digest(source, lambda: hashlib.blake2b(caller.tenant.encode(), digest_size=12))
            id, nbytes = f"file-{digest.hexdigest()}", source.tell()
            with suppress(NotFound):
                there = self.rows.get(caller.tenant, id)
                if there.expires > self._clock() + 86_400 and self.contents.has(id):
                    return there
            source.seek(0)
            return self._examples(caller, id, filename, nbytes, iter(lambda: source.read(1 << 20), b""))

    def _examples(self, caller: Caller, id: str, filename: str, nbytes: int, chunks: Iterable[bytes]) -> StoredFile:
        self.rows.check_count(caller.tenant)
        with self.ledger.room(caller.tenant, Kind.FILES) as room, self.contents.incoming() as (path, sink):
            room.expect(nbytes)
            for chunk in chunks:
                room.take(len(chunk))
                write(sink, chunk)
            now = self._clock()
            expires = now + self.limits.file_seconds
            file = StoredFile(id, caller.tenant, caller.name, EXAMPLES, filename, nbytes, now, expires)
            self._keep(file, path)
        return file

    def content(self, tenant: str, id: str) -> tuple[StoredFile, Path]:
        """The file, and where it can be read. Blocks."""
        return self.rows.get(tenant, id), self.contents.path(id)

    def remove(self, tenant: str, id: str) -> None:
        """Blocks."""
        self.rows.check_unused(tenant, id)
        self.contents.remove(id)
        self.rows.remove(id)

    def compose(self, id: str, chunks: Iterable[bytes]) -> int:
        """Write the content of a file of the server's own: its size. Without bytes none is kept.

        The file has no row yet: whoever makes the chunks has room for them. Blocks.
        """
        nbytes = 0
        with self.contents.incoming() as (path, sink):
            for chunk in chunks:
                nbytes += len(chunk)
                write(sink, chunk)
            sink.flush()
            if nbytes:
                self.contents.keep(id, path)
        return nbytes

    def sweep(self) -> None:
        """Drop files whose time is over, and bytes without a row. Blocks."""
        for id in self.rows.expired():
            self.contents.remove(id)
            self.rows.remove(id)
        self.contents.sweep(self.rows.ids())


def _bound(nbytes: int) -> Bound:
    """What a tenant keeps: its files, what is answered for it, and what is on its way."""
    kinds = frozenset({Kind.FILES, Kind.ANSWERS})
    return Bound(kinds, nbytes, "files", "delete some", code="file_limit_exceeded")


def _expiry(fields: Mapping[str, str], default: float) -> float:
    """Seconds for which a file is kept, by the form's `expires_after[...]`."""
    anchor, seconds = fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return default
    if anchor != "created_at":
        raise BadRequest(f"expires_after[anchor] takes created_at, not {shown(anchor)}", param="expires_after")
    if seconds is None or not seconds.isascii() or not seconds.isdigit() or int(seconds[:9]) not in EXPIRY:
        raise BadRequest(
            f"expires_after[seconds] takes a number from {EXPIRY[0]} to {EXPIRY[-1]}, not {shown(seconds, 40)}",
            param="expires_after",
        )
    return float(seconds)
