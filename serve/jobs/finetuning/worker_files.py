"""What a job that another machine trains is made of: what the worker fetches, and what it brings back."""

from __future__ import annotations

import asyncio
import re
import secrets
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from serve.adapters.adapter import FILES
from serve.adapters.byte_ledger import Kind, Room
from serve.adapters.store import Store
from serve.adapters.untrusted import create, write
from serve.errors import BadRequest, NotFound, TooLarge
from serve.files import fsync_tree, rename
from serve.jobs.batches.file_bytes import FileBytes
from serve.jobs.finetuning.job_folder import JobFolder
from serve.jobs.finetuning.job_folders import JobFolders
from serve.jobs.finetuning.objects import Job
from serve.names import shown
from serve.rollout.validation import REPORT_BYTES

# A result has a few; another worker may have brought others before.
MOST_CHECKPOINTS = 10
# Of what a worker brings besides adapters.
_MOST_BYTES = {"progress.jsonl": 256 << 20, "settings.json": 64 << 10, "validation.json": REPORT_BYTES}
TRAINING = "training.jsonl"
VALIDATION = "validation.jsonl"
PARENT = "parent/"
_RESULT = re.compile(
    rf"(?:adapter|checkpoints/step-[0-9]{{6,9}})/(?:{'|'.join(map(re.escape, FILES))})|progress\.jsonl"
    r"|settings\.json|validation\.json"
)


class WorkerFiles:
    """What a worker brings is laid into the job's folder here; `max_bytes` is what a file of it may have."""

    def __init__(self, folders: JobFolders, contents: FileBytes, store: Store, max_bytes: int) -> None:
        self._folders = folders
        self._contents = contents
        self._store = store
        self._max_bytes = max_bytes

    async def find(self, job: Job, name: str) -> Path:
        """Where a file that the job is trained with can be read."""
        files = {TRAINING: job.training_file, VALIDATION: job.validation_file}
        if file := files.get(name):
            return await asyncio.to_thread(self._contents.path, file)
        if job.asked.parent and name in {PARENT + each for each in FILES}:
            return await self._store.bring(job.asked.parent_digest) / name.removeprefix(PARENT)
        raise NotFound(f"{job.id} is trained without {shown(name)}", param="name")

    @asynccontextmanager
    async def received(self, job: Job, name: str, stream: AsyncIterator[bytes], stated: int) -> AsyncIterator[None]:
        """A file of the result, here in the block, and kept at its end unless that fails.

        A second one of its name takes its place.
        """
        if not _RESULT.fullmatch(name):
            raise BadRequest(f"{shown(name)} is no file of a result", param="name")
        room = self._folders.room(job)
        await asyncio.to_thread(self._store.ledger.check, job.tenant, Kind.TRAINING, stated)
        target, most = self.incoming(job.id) / name, self._most(name)
        await asyncio.to_thread(self._check_checkpoints, target)
        part = target.with_name(f"{target.name}.{secrets.token_hex(4)}")
        await asyncio.to_thread(target.parent.mkdir, mode=0o700, parents=True, exist_ok=True)
        sink = await asyncio.to_thread(create, part)
        try:
            with sink:
                nbytes = 0
                async for chunk in stream:
                    nbytes += len(chunk)
                    if nbytes > most:
                        raise TooLarge(f"{name} is above {most} bytes, the most that it may have")
                    await asyncio.to_thread(room.take, len(chunk))
                    await asyncio.to_thread(write, sink, chunk)
            yield
            if self._contents.is_shared:  # the next request may meet another server
                await asyncio.to_thread(self._contents.pass_on, _passed_as(job.id, name), part)
            else:
                await asyncio.to_thread(part.replace, target)
        finally:
            await asyncio.to_thread(part.unlink, missing_ok=True)
            await asyncio.to_thread(self._folders.count, job)

    def lay(self, job: Job) -> list[str]:
        """Make the result, which is here, the content of the job's folder; what was passed on for it. Blocks."""
        folder = self._folders.folder(job.id)
        passed: list[str] = []
        if folder.adapter is not None:
            return passed
        incoming = self.incoming(job.id)
        if self._contents.is_shared:
            try:
                passed = self._fetched(job.id, incoming, self._folders.room(job))
            finally:
                self._folders.count(job)
        if not all((incoming / "adapter" / name).is_file() for name in FILES):
            raise BadRequest(
                f"the result of {job.id} is not whole here: send {' and '.join(FILES)} below adapter/; where several "
                "servers without `blobs` have one address, give the worker the address of one of them"
            )
        fsync_tree(incoming)
        # The adapter says that all is there.
        for name in ("checkpoints", "progress.jsonl", "settings.json", "validation.json", "adapter"):
            _replace(incoming / name, folder.path / name)
        self._folders.count(job)
        return passed

    def drop(self, passed: list[str]) -> None:
        """What was passed on has arrived. Blocks."""
        for name in passed:
            self._contents.drop_passing(name)

    def incoming(self, id: str) -> Path:
        return self._folders.folder(id).path / "incoming"

    def _most(self, name: str) -> int:
        """Bytes of a file of a result."""
        return min(self._max_bytes, _MOST_BYTES.get(name, self._max_bytes))

    @staticmethod
    def _check_checkpoints(target: Path) -> None:
        """TooLarge for one more than a job may have here."""
        folder = target.parent
        if folder.parent.name != "checkpoints" or folder.is_dir() or not folder.parent.is_dir():
            return
        if len(list(folder.parent.iterdir())) >= MOST_CHECKPOINTS:
            raise TooLarge(
                f"a result has {MOST_CHECKPOINTS} checkpoints at most: bring the last ones alone", param="name"
            )

    def _fetched(self, id: str, incoming: Path, room: Room) -> list[str]:
        """Bring here what was sent to any server: as what it was passed on."""
        fetched = []

        def receive(*names: str) -> None:
            for name in filter(_RESULT.fullmatch, names):
                if self._contents.receive(passed := _passed_as(id, name), incoming / name, room):
                    fetched.append(passed)

        receive("progress.jsonl", "settings.json", "validation.json", *(f"adapter/{name}" for name in FILES))
        checkpoints = {str(line["checkpoint"]) for line in JobFolder(incoming).lines() if line.get("checkpoint")}
        receive(*(f"{checkpoint}/{name}" for checkpoint in sorted(checkpoints)[-MOST_CHECKPOINTS:] for name in FILES))
        return fetched


def _passed_as(id: str, name: str) -> str:
    """A file of a result, where all servers look."""
    return f"{id}-{name.replace('/', '-')}"


def _replace(source: Path, target: Path) -> None:
    """In the place of what is there."""
    if target.is_dir():
        shutil.rmtree(target)
    target.unlink(missing_ok=True)
    if source.exists():
        rename(source, target)
