"""The folders of this server's jobs, on their tenants' accounts."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress

from serve.adapters.byte_ledger import Kind, Room, Rooms, size_of
from serve.adapters.store import Store
from serve.errors import OutOfSpace
from serve.jobs.finetuning.job_folder import JobFolder
from serve.jobs.finetuning.job_rows import JobRows
from serve.jobs.finetuning.objects import Job


class JobFolders:
    """What looks at a folder's size blocks."""

    def __init__(self, store: Store, rows: JobRows) -> None:
        self.ledger = store.ledger
        self._root = store.root / "finetuning"
        self._rooms = Rooms(self.ledger, Kind.TRAINING)
        for job in rows.open():  # what a server before this one left here
            self.count(job)

    def folder(self, id: str) -> JobFolder:
        return JobFolder(self._root / id)

    def room(self, job: Job) -> Room:
        """What the ledger has for the job's folder."""
        return self._rooms.of(job.id, job.tenant)

    def count(self, job: Job) -> None:
        """The folder has so many bytes now."""
        self.room(job).count(size_of(self._root / job.id))

    def measure(self, job: Job) -> None:
        """As `count` while it is trained; QuotaExceeded, if its tenant has no room for it."""
        with suppress(OutOfSpace):  # what is trained already is not thrown away for others
            self.room(job).measure(size_of(self._root / job.id))

    def remove(self, id: str) -> None:
        """The job is at its end."""
        self.folder(id).remove()
        self._rooms.close(id)

    def sweep(self, kept: Collection[str]) -> None:
        """Drop the folders of all other jobs."""
        if self._root.is_dir():
            for folder in self._root.iterdir():
                if folder.name not in kept:
                    self.remove(folder.name)
