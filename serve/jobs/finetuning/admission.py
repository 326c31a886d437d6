"""A trained adapter becomes a version of a name, as an upload by the key that made the job would."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi.concurrency import contextmanager_in_threadpool

from serve.adapters.adapter import FILES, MANIFEST, Adapter
from serve.adapters.byte_ledger import Kind, size_of
from serve.adapters.store import Store
from serve.auth.auth import Auth, Caller, Scope, allowed
from serve.errors import Conflict, EngineUnavailable, LoradockError, Unauthorized
from serve.jobs.finetuning.objects import Job
from serve.names import short_name
from serve.rollout.admit import VersionAdmission
from serve.rollout.lifecycle import Lifecycle

log = logging.getLogger(__name__)

NO_CHECKS: Mapping[str, Any] = {}


class Admission:
    def __init__(self, versions: VersionAdmission, lifecycle: Lifecycle, store: Store, auth: Auth) -> None:
        self._versions = versions
        self._lifecycle = lifecycle
        self._registry = lifecycle.registry
        self.store = store
        self._auth = auth

    def caller(self, job: Job) -> Caller:
        """Who asked for the job; Unauthorized or Forbidden once the key may not do it any more."""
        caller = allowed(self._auth.holder(job.asked.key), Scope.ADAPTERS)
        if caller.tenant != job.tenant:
            raise Unauthorized("the API key that asked for this is another tenant's by now", code="invalid_api_key")
        return caller

    async def try_out(self, job: Job, adapter: Path) -> None:
        """Every check of `admit`, or its error; nothing of it stays."""
        caller = self.caller(job)
        async with self._copied(job, adapter, _provenance(job, {})) as folder:
            await self._lifecycle.try_push(job.asked.name, folder, quota=caller.limits, engine=job.asked.base)

    async def admit(
        self, job: Job, adapter: Path, settled: Mapping[str, Any], *, final: bool, checks: Mapping[str, Any] = NO_CHECKS
    ) -> str:
        """The public name of the version; these bytes a second time are the same version. `checks` are kept with it.

        The final one is to be live if no version of its name is: what answers today is a person's or a policy's to
        replace.
        """
        caller, name = self.caller(job), job.asked.name
        first = final and (name not in self._registry or self._registry.live(name) is None)
        why = f"fine-tuning job {job.id}"
        notes = {"fine_tuning_job": job.id, **({"parent": job.asked.parent} if job.asked.parent else {}), **checks}
        try:
            async with self._copied(job, adapter, _provenance(job, settled)) as folder:
                version, _ = await self._versions.push(
                    name,
                    folder,
                    by=caller.name,
                    promote=first,
                    why=why,
                    quota=caller.limits,
                    engine=job.asked.base,
                    expected=0 if first else None,
                    notes=notes,
                )
        except Conflict:
            if not first:
                raise
            # A version went live meanwhile, which stays.
            return await self.admit(job, adapter, settled, final=False, checks=checks)
        return public_name(version, job.tenant)

    async def admitted(self, job: Job, adapter: Path, settled: Mapping[str, Any]) -> str:
        """As `admit` for the adapter of an earlier epoch; "" if it is refused."""
        try:
            return await self.admit(job, adapter, settled, final=False)
        except EngineUnavailable:
            raise
        except LoradockError as error:
            log.warning("an earlier epoch of %s is no version: %s", job.id, error.message)
            return ""

    @asynccontextmanager
    async def _copied(self, job: Job, adapter: Path, manifest: Mapping[str, Any]) -> AsyncIterator[Path]:
        """The files of an upload, on the tenant's account as long as they are there."""
        with self.store.ledger.room(job.tenant, Kind.UPLOADS) as room:
            room.count(await asyncio.to_thread(size_of, adapter))
            async with contextmanager_in_threadpool(self.store.quarantine(room)) as folder:
                await asyncio.to_thread(_copy, adapter, folder, manifest)
                yield folder


def public_name(adapter: Adapter, tenant: str) -> str:
    """By which its tenant asks this very version."""
    return f"{short_name(adapter.name, tenant)}@v{adapter.version}"


def _provenance(job: Job, settled: Mapping[str, Any]) -> dict[str, Any]:
    asked, state = job.asked, job.state
    stated = {
        "trained_by": asked.who,
        "trained_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(job.created)),
        "base_model": asked.base,
        "base_digest": state.base_digest,
        "data_digest": state.data_digest,
        "origin": f"fine-tuning job {job.id}",
    }
    return {"provenance": stated, "hyperparameters": dict(settled)}


def _copy(adapter: Path, folder: Path, manifest: Mapping[str, Any]) -> None:
    for name in FILES:
        shutil.copyfile(adapter / name, folder / name)
    (folder / MANIFEST).write_text(json.dumps(manifest))
