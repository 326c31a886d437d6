"""Files and batches as a whole: kept, listed, made and cancelled here; run by `BatchSchedule`."""

from __future__ import annotations

import asyncio
import hashlib
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import IO

from fastapi.concurrency import contextmanager_in_threadpool

from serve.adapters.byte_ledger import Bound, Kind, Room
from serve.adapters.registry.registry import Registry
from serve.adapters.store import Store
from serve.adapters.untrusted import write
from serve.auth.auth import Auth, Caller
from serve.errors import BadRequest, LoradockError, NotFound
from serve.gateway.guard import Guards
from serve.gateway.internal_request import InternalRequests
from serve.gateway.router import Router
from serve.jobs.batches.answers import AnswerFiles
from serve.jobs.batches.batch_rows import BatchRows
from serve.jobs.batches.batch_runner import BatchRunner
from serve.jobs.batches.file_bytes import FileBytes
from serve.jobs.batches.file_rows import FileRows
from serve.jobs.batches.json_lines import check_objects
from serve.jobs.batches.line_runner import LineRunner
from serve.jobs.batches.metrics import BatchMetrics
from serve.jobs.batches.objects import ENDPOINTS, EXAMPLES, INPUT, SENT, Batch, Limits, Status, StoredFile
from serve.jobs.batches.schedule import BatchSchedule
from serve.jobs.batches.upload import FRAMING, receive, too_large
from serve.names import shown

MAX_METADATA = 16
MAX_KEY = 64
MAX_VALUE = 512
# An expiry that a client may choose, in seconds: an hour to 30 days, as OpenAI's.
EXPIRY = range(3600, 30 * 86_400 + 1)
_WINDOW = re.compile(r"([1-9][0-9]{0,3})h")


class Batches:
    """`me` is this server's name; `alone` says that nobody shares its registry. The rest is as the parts take it."""

    def __init__(
        self,
        registry: Registry,
        store: Store,
        auth: Auth,
        router: Router,
        requests: InternalRequests,
        guards: Guards | None = None,
        *,
        limits: Limits,
        me: str,
        alone: bool,
        fresh: Callable[[], Awaitable[None]] | None = None,
        doubted: Callable[[LoradockError], LoradockError] = lambda error: error,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._limits, self._clock = limits, clock
        self.metrics = BatchMetrics(clock)
        self.contents = FileBytes(store.root / "files", store.shared)
        self.files = FileRows(registry, limits, clock)
        self.rows = BatchRows(registry, limits, me=me, clock=clock)
        self.ledger = store.ledger
        self.ledger.counts(Kind.FILES, self.files.kept)
        self.ledger.bound(_bound(limits.tenant_bytes))
        self.answers = AnswerFiles(store.root / "files/answers", store.shared, self.rows, self.ledger)
        lines = LineRunner(auth, router, requests, guards, concurrency=limits.concurrency, fresh=fresh, doubted=doubted)
        runner = BatchRunner(
            self.rows, self.contents, self.answers, self.ledger, lines, limits,
            self.metrics.counted, self.metrics.ended, clock,
        )  # fmt: skip
        self.schedule = BatchSchedule(
            self.rows, self.files, self.contents, self.answers, runner, self.metrics, alone=alone, clock=clock
        )

    async def upload(self, caller: Caller, stream: AsyncIterator[bytes], content_type: str, stated: int) -> StoredFile:
        """Keep a file that arrives as a form; `stated` is how many bytes the client says are coming."""
        limits = self._limits
        if stated > limits.file_bytes + FRAMING:
            raise too_large(limits.file_bytes)
        await asyncio.to_thread(self.files.check_count, caller.tenant)
        async with self._incoming(caller.tenant, max(0, stated - FRAMING)) as (path, sink, room):
            form = await receive(stream, content_type, sink, room, max_bytes=limits.file_bytes)
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
            self.files.add(file)
        except BaseException:
            self.contents.remove(file.id)
            raise

    def adopt(self, caller: Caller, path: Path, filename: str) -> StoredFile:
        """A file of examples that this server wrote for a tenant; the same bytes are the same file. Blocks."""
        with path.open("rb") as source:
            digest = hashlib.file_digest(source, lambda: hashlib.blake2b(caller.tenant.encode(), digest_size=12))
            id, nbytes = f"file-{digest.hexdigest()}", source.tell()
            with suppress(NotFound):
                there = self.files.get(caller.tenant, id)
                if there.expires > self._clock() + 86_400 and self.contents.has(id):
                    return there
            source.seek(0)
            return self._examples(caller, id, filename, nbytes, iter(lambda: source.read(1 << 20), b""))

    def _examples(self, caller: Caller, id: str, filename: str, nbytes: int, chunks: Iterable[bytes]) -> StoredFile:
        self.files.check_count(caller.tenant)
        with self.ledger.room(caller.tenant, Kind.FILES) as room, self.contents.incoming() as (path, sink):
            room.expect(nbytes)
            for chunk in chunks:
                room.take(len(chunk))
                write(sink, chunk)
            now = self._clock()
            expires = now + self._limits.file_seconds
            file = StoredFile(id, caller.tenant, caller.name, EXAMPLES, filename, nbytes, now, expires)
            self._keep(file, path)
        return file

    def content(self, tenant: str, id: str) -> tuple[StoredFile, Path]:
        """The file, and where it can be read. Blocks."""
        return self.files.get(tenant, id), self.contents.path(id)

    def remove(self, tenant: str, id: str) -> None:
        """Blocks."""
        self.files.check_unused(tenant, id)
        self.contents.remove(id)
        self.files.remove(id)

    def create(
        self,
        caller: Caller,
        *,
        input_file: str,
        endpoint: str,
        window: str,
        metadata: Mapping[str, str] | None,
        file_seconds: int | None,
    ) -> Batch:
        """A new batch of the caller's; BadRequest for what cannot be one. Blocks."""
        if endpoint not in ENDPOINTS:
            raise BadRequest(f"endpoint takes {', '.join(ENDPOINTS)}; not {shown(endpoint)}", param="endpoint")
        hours = _WINDOW.fullmatch(window)
        if hours is None or int(hours[1]) > self._limits.window_hours:
            raise BadRequest(
                f"completion_window takes hours, as 24h, up to {self._limits.window_hours}h; not {shown(window)}",
                param="completion_window",
            )
        check_metadata(metadata or {})
        try:
            file = self.files.get(caller.tenant, input_file)
        except NotFound as missing:
            raise BadRequest(missing.message, param="input_file_id") from missing
        if file.purpose != INPUT:
            raise BadRequest(
                f"{file.id} has the purpose `{file.purpose}`: send a file with `batch`", param="input_file_id"
            )
        now = self._clock()
        batch = Batch(
            id=f"batch_{secrets.token_hex(16)}",
            tenant=caller.tenant,
            key=caller.key,
            who=caller.name,
            status=Status.VALIDATING,
            endpoint=endpoint,
            input_file=file.id,
            completion_window=window,
            metadata=metadata,
            created=now,
            expires=now + 3600 * int(hours[1]),
            file_seconds=float(file_seconds or self._limits.file_seconds),
        )
        self.rows.add(batch)
        return batch


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


def check_metadata(metadata: Mapping[str, str]) -> None:
    """BadRequest for more than OpenAI's objects take."""
    if len(metadata) > MAX_METADATA:
        raise BadRequest(f"metadata takes up to {MAX_METADATA} entries, not {len(metadata)}", param="metadata")
    for key, value in metadata.items():
        if len(key) > MAX_KEY or len(value) > MAX_VALUE:
            raise BadRequest(
                f"metadata takes keys of up to {MAX_KEY} characters and values of up to {MAX_VALUE}: see "
                f"{shown(key, 40)}",
                param="metadata",
            )
