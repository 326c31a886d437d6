"""vLLM's resolver folder, over versions: what a request names and nobody pushed is taken from a configured folder.

Off unless `resolver_folder` is set. `NAME` there is a PEFT folder; it is admitted as by a push, with the server's probe
and the caller's quota, and is version 1. Whatever has a version is never looked for: what was unloaded stays unloaded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from copy import copy
from functools import partial
from pathlib import Path

from serve.adapters.adapter import CONFIG, FILES
from serve.adapters.fetch import fetch
from serve.adapters.registry.registry import Registry
from serve.adapters.sources.address import parse
from serve.api.health import Health
from serve.api.incoming import Incoming
from serve.api.schemas import Fetch
from serve.auth.audit import Audit
from serve.auth.auth import Caller
from serve.config import Config
from serve.errors import BadRequest, Conflict, LoradockError
from serve.names import DEFAULT, check_name

# Names whose refusal is remembered, so that asking again costs a look at the folder and no admission.
MAX_REFUSED = 1024

# What tells that a folder has changed since: when and how long its files are.
_State = tuple[tuple[int, int], ...]


class FolderResolver:
    """`bring` is what Inference asks about a model that nobody knows."""

    def __init__(self, config: Config, registry: Registry, incoming: Incoming, health: Health, audit: Audit) -> None:
        self._config = config
        self._registry = registry
        self._incoming = incoming
        self._health = health
        self._audit = audit
        self._root = Path(config.resolver_folder).absolute()
        self._coming: dict[str, asyncio.Task[None]] = {}
        self._refused: dict[str, tuple[_State, LoradockError]] = {}

    async def bring(self, name: str, caller: Caller) -> bool:
        """Whether the name is an adapter now; what its admission refuses is raised, and remembered with the folder."""
        if caller.tenant != DEFAULT or name in self._registry or not _may_be_a_name(name):
            return False
        state = await asyncio.to_thread(_state, self._root / name)
        if state is None:
            return False
        self._health.check_started()
        was, error = self._refused.get(name, (None, None))
        if error and was == state:
            raise copy(error)  # one that is raised keeps the frames of the request that met it
        try:
            await asyncio.shield(self._once(name, caller, state))
        except Conflict:
            if name not in self._registry:
                raise
        return True  # perhaps by a push that was faster

    def _once(self, name: str, caller: Caller, state: _State) -> Awaitable[None]:
        """The one admission that all requests for this name wait for, whoever of them leaves."""
        if name not in self._coming:
            task = self._coming[name] = asyncio.create_task(self._admitted(name, caller, state))
            task.add_done_callback(partial(self._came, name))
        return self._coming[name]

    def _came(self, name: str, task: asyncio.Task[None]) -> None:
        del self._coming[name]
        if not task.cancelled():
            task.exception()  # whoever waits has it; if nobody does, it is no news

    async def _admitted(self, name: str, caller: Caller, state: _State) -> None:
        address = f"file://{self._root / name}"
        subject, status = name, 500
        try:
            source = parse(address, (self._root,))
            async with self._incoming.quarantined(caller) as (folder, room):
                came = await asyncio.to_thread(fetch, source, folder, room, max_bytes=self._config.max_upload_bytes)
                asked = Fetch(name, address, why=f"from {address}, for a request")
                adapter, _ = await self._incoming.admit(caller, asked, folder, expected=0, came=came)
            subject, status = adapter.tag, 200
            self._refused.pop(name, None)
        except LoradockError as error:
            status = error.status
            if status < 429 and not isinstance(error, Conflict):  # it would be refused again
                while len(self._refused) >= MAX_REFUSED:
                    del self._refused[next(iter(self._refused))]
                self._refused[name] = (state, copy(error))
            raise
        finally:
            line = {"tenant": caller.tenant, "key": caller.key, "what": "resolve_adapter", "subject": subject}
            await asyncio.to_thread(self._audit.write, status=status, who=caller.name, **line)


def _may_be_a_name(name: str) -> bool:
    try:
        check_name(name)
    except BadRequest:
        return False
    return True


def _state(folder: Path) -> _State | None:
    """Of an adapter's files; None for a folder that has no configuration of one."""
    found = []
    for path in (folder, *(folder / name for name in FILES)):
        try:
            stat = path.stat()
        except OSError:
            if path.name == CONFIG:
                return None
            continue
        found.append((stat.st_mtime_ns, stat.st_size))
    return tuple(found)
