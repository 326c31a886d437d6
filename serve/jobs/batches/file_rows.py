"""Which files there are, in the registry's database. All methods block."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import fields
from typing import Any

from sqlalchemy import Connection, delete, func, insert, or_, select

from serve.adapters.registry.registry import Registry
from serve.adapters.registry.tables import FINETUNE_ENDS, batches, finetune_jobs
from serve.adapters.registry.tables import files as table
from serve.adapters.registry.work_table import Page, paged
from serve.errors import Conflict, NotFound, QuotaExceeded
from serve.jobs.batches.objects import OPEN, Limits, StoredFile
from serve.names import shown

_UNDER_WAY = finetune_jobs.c.status.not_in(FINETUNE_ENDS)
_COLUMNS = tuple(field.name for field in fields(StoredFile))


class FileRows:
    """`clock` is the time of day, in seconds. A file that has expired is not there, whoever asks."""

    def __init__(self, registry: Registry, limits: Limits, clock: Callable[[], float] = time.time) -> None:
        self._registry = registry
        self._limits = limits
        self._clock = clock

    def add(self, file: StoredFile) -> None:
        """Keep a file that a client sent; QuotaExceeded if the tenant has as much as it may, its answers too."""
        with self._registry.adding(file.tenant) as connection:
            self._check_quota(connection, file.tenant, file.nbytes)
            put(connection, file)

    def check_count(self, tenant: str) -> None:
        """QuotaExceeded, if another file would be one too many."""
        with self._registry.reading() as connection:
            self._check_quota(connection, tenant, 0)

    def kept(self, tenant: str | None) -> dict[str, int]:
        """Bytes by tenant: of this one, or of all."""
        query = select(table.c.tenant, func.sum(table.c.nbytes)).group_by(table.c.tenant)
        if tenant is not None:
            query = query.where(table.c.tenant == tenant)
        with self._registry.reading() as connection:
            return {name: int(nbytes) for name, nbytes in connection.execute(query)}

    def get(self, tenant: str, id: str) -> StoredFile:
        """NotFound also for another tenant's."""
        here = (table.c.id == id, table.c.tenant == tenant, table.c.expires > self._clock())
        with self._registry.reading() as connection:
            row = connection.execute(select(table).where(*here)).first()
        if row is None:
            raise missing(id)
        return _file(row)

    def page(
        self, tenant: str, *, after: str | None, limit: int, ascending: bool, purpose: str | None
    ) -> Page[StoredFile]:
        """A tenant's files; from behind the file `after`."""
        query = select(table).where(table.c.tenant == tenant, table.c.expires > self._clock())
        if purpose is not None:
            query = query.where(table.c.purpose == purpose)
        with self._registry.reading() as connection:
            rows = paged(connection, table, query, tenant, after, limit, ascending)
        return Page([_file(row) for row in rows[:limit]], len(rows) > limit)

    def check_unused(self, tenant: str, id: str) -> None:
        """NotFound, or Conflict while a batch or a fine-tuning job reads it."""
        self.get(tenant, id)
        with self._registry.reading() as connection:
            batch = connection.scalar(
                select(batches.c.id).where(batches.c.input_file == id, batches.c.status.in_(OPEN)).limit(1)
            )
            job = connection.scalar(select(finetune_jobs.c.id).where(_reads(id), _UNDER_WAY).limit(1))
        if batch is not None:
            raise Conflict(f"{id} is read by {batch}, which is not at its end: cancel that batch first")
        if job is not None:
            raise Conflict(f"{id} is read by {job}, which is not at its end: cancel that job first")

    def remove(self, id: str) -> None:
        """Forget it; its bytes are gone already."""
        with self._registry.adding() as connection:
            connection.execute(delete(table).where(table.c.id == id))

    def expired(self) -> list[str]:
        """Files whose time is over, but for those that a batch or a fine-tuning job still reads."""
        in_use = select(batches.c.input_file).where(batches.c.status.in_(OPEN))
        with self._registry.reading() as connection:
            of_jobs = select(finetune_jobs.c.training_file, finetune_jobs.c.validation_file).where(_UNDER_WAY)
            learned = {id for row in connection.execute(of_jobs) for id in row}
            query = select(table.c.id).where(table.c.expires <= self._clock(), table.c.id.not_in(in_use))
            return [id for id in connection.scalars(query) if id not in learned]

    def ids(self) -> Collection[str]:
        """Every file's."""
        with self._registry.reading() as connection:
            return set(connection.scalars(select(table.c.id)))

    def totals(self) -> tuple[int, int]:
        """Files of all tenants, and their bytes."""
        with self._registry.reading() as connection:
            return _totals(connection)

    def _check_quota(self, connection: Connection, tenant: str, nbytes: int) -> None:
        limits = self._limits
        count, kept = _totals(connection, tenant)
        if count + 1 > limits.tenant_files:
            raise QuotaExceeded(
                f"this tenant keeps {count} files, and {limits.tenant_files} are the most: delete some",
                code="file_limit_exceeded",
            )
        if kept + nbytes > limits.tenant_bytes:
            raise QuotaExceeded(
                f"this tenant's files have {kept} bytes, {nbytes} more pass its {limits.tenant_bytes}: delete some",
                code="file_limit_exceeded",
            )


def _reads(id: str) -> Any:
    """That a fine-tuning job reads this file."""
    return or_(finetune_jobs.c.training_file == id, finetune_jobs.c.validation_file == id)


def put(connection: Connection, file: StoredFile) -> None:
    """Write the row, in the place of an earlier one of this id."""
    connection.execute(delete(table).where(table.c.id == file.id))
    connection.execute(insert(table).values({name: getattr(file, name) for name in _COLUMNS}))


def missing(id: str) -> NotFound:
    return NotFound(f"No such File object: {shown(id)}", param="id")


def _totals(connection: Connection, tenant: str | None = None) -> tuple[int, int]:
    """Files and bytes, of one tenant or of all."""
    query = select(func.count(), func.coalesce(func.sum(table.c.nbytes), 0))
    if tenant is not None:
        query = query.where(table.c.tenant == tenant)
    count, nbytes = connection.execute(query.select_from(table)).one()
    return int(count), int(nbytes)


def _file(row: Any) -> StoredFile:
    return StoredFile(**{name: getattr(row, name) for name in _COLUMNS})
