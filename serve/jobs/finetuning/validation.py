"""Validates a version that is there already, when somebody asks for it: what it did to its base, and what it leaks.

The program reads the weights on the processor, at the lowest priority; one at a time.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from serve.adapters.adapter import Adapter
from serve.adapters.store import Store
from serve.auth.auth import Caller
from serve.errors import BadRequest, Conflict, EngineUnavailable, NotFound
from serve.gateway.router import Router
from serve.jobs.batches.files import Files
from serve.jobs.batches.objects import EXAMPLES
from serve.jobs.finetuning.training_process import TrainingProcess
from serve.models.checkpoint import folder_of
from serve.models.gguf.checkpoint import to_train

VALIDATED = "validated"
Result = TypeVar("Result")


class Validation:
    def __init__(self, router: Router, store: Store, files: Files, process: TrainingProcess) -> None:
        self._router = router
        self._store = store
        self._files = files
        self.process = process
        self._is_running = False

    async def run(self, version: Adapter, caller: Caller, files: dict[str, str]) -> dict[str, Any]:
        """What is kept of the report with the version; `files` are ids of examples: those that it was trained on
        (`training_file`), and held-out ones (`validation_file`)."""
        if package := self.process.missing_package():
            raise BadRequest(f"this server cannot validate: its operator installs {package} (`pip install {package}`)")
        if self._is_running:  # whose it is, is for its own tenant to know
            raise Conflict("this server validates one version at a time, and one is under way: ask again in a minute")
        self._is_running = True
        try:
            given = await asyncio.to_thread(self._given, caller, files)
            adapter = await self._store.bring(version.digest)
            served = self._router.fleet.of(version.name).model
            model = await asyncio.to_thread(lambda: to_train(folder_of(served)))
            report = await _stoppable(partial(self.process.validate, adapter, model, given))
        finally:
            self._is_running = False
        if report is None:
            raise EngineUnavailable("the server is stopping: validate it again later")
        kept = report.kept()
        note = partial(self._router.registry.note, version.name, VALIDATED, version.version)
        await asyncio.to_thread(note, by=caller.name, why=report.verdict, checks=kept)
        return kept

    def _given(self, caller: Caller, files: dict[str, str]) -> dict[str, Path]:
        given = {}
        for param, id in files.items():
            try:
                file = self._files.rows.get(caller.tenant, id)
                given[FLAGS[param]] = self._files.contents.path(file.id)
            except NotFound as missing:
                raise BadRequest(missing.message, param=param) from missing
            if file.purpose != EXAMPLES:
                raise BadRequest(f"{file.id} has the purpose `{file.purpose}`: send it with `fine-tune`", param=param)
        return given


# What the program calls them.
FLAGS = {"training_file": "train", "validation_file": "validation"}


async def _stoppable(run: Callable[[threading.Event], Result]) -> Result:
    """What it answers on a thread; it is told to stop when nobody waits any more."""
    stop = threading.Event()
    running = asyncio.create_task(asyncio.to_thread(run, stop))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        stop.set()
        await asyncio.gather(running, return_exceptions=True)
        raise
