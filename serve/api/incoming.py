"""A version on its way in: its bytes from the request or from an address, and what its adapter's policy makes of it."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
from fastapi import Request
from fastapi.concurrency import contextmanager_in_threadpool

from serve.adapters.adapter import Adapter
from serve.adapters.byte_ledger import Kind, Room
from serve.adapters.fetch import fetch
from serve.adapters.provenance import fetched_from, measured, provenance_of
from serve.adapters.sources.address import Source, parse
from serve.adapters.store import Store
from serve.adapters.tensor_upload import CONFIG_HEADER, KINDS, receive_tensors
from serve.adapters.upload import receive
from serve.api.json_body import converted, decoded
from serve.api.removal import Removal
from serve.api.schemas import Fetch
from serve.auth.auth import Caller
from serve.config import Config
from serve.engine.effect_probe import ANY_EFFECT
from serve.errors import BadRequest
from serve.names import DEFAULT, check_name, full_name, shown
from serve.rollout.admit import VersionAdmission
from serve.rollout.lifecycle import Lifecycle

# What an upload may have beside the weights that a key's `adapter_bytes` is about: its configuration, and framing.
NOTES_BYTES = 4 << 20
_FIELDS = ("name", "visibility", "engine", "why", "probe_min_effect", "conversion_error", "keep")
_SWITCHES = {"promote": "true", "probe": "true", "dry_run": "false"}  # with what they are by default


class Incoming:
    """Takes versions in."""

    def __init__(
        self, config: Config, store: Store, lifecycle: Lifecycle, admission: VersionAdmission, removal: Removal
    ) -> None:
        self._config = config
        self._store = store
        self._lifecycle = lifecycle
        self._admission = admission
        self._removal = removal

    @asynccontextmanager
    async def quarantined(self, caller: Caller, stated: int = 0) -> AsyncIterator[tuple[Path, Room]]:
        """A private folder for an adapter on its way in, gone at the end; and room in it, `stated` bytes at once."""
        quota = caller.limits.adapter_bytes
        quota = None if quota is None else quota + NOTES_BYTES
        with self._store.ledger.room(caller.tenant, Kind.UPLOADS, quota=quota) as room:
            await asyncio.to_thread(room.expect, min(stated, self._config.max_upload_bytes))
            async with contextmanager_in_threadpool(self._store.quarantine(room)) as folder:
                yield folder, room

    async def admit(
        self,
        caller: Caller,
        asked: Fetch,
        folder: Path,
        *,
        expected: int | None = None,
        came: Source | None = None,
        notes: Mapping[str, Any] | None = None,
    ) -> tuple[Adapter, bool]:
        """The version that the adapter in `folder` becomes, with traffic by its policy; and whether it is new."""
        full = full_name(caller.tenant, check_name(asked.name))
        adapter, created = await self._admission.push(
            full,
            folder,
            by=caller.name,
            promote=asked.promote,
            why=asked.why,
            shared=None if asked.visibility is None else asked.visibility == "shared",
            quota=caller.limits,
            engine=asked.engine,
            expected=expected,
            min_effect=asked.probe_min_effect if asked.probe else ANY_EFFECT,
            conversion_error=asked.conversion_error,
            notes={**(fetched_from(came) if came else {}), **(notes or {})},
        )
        if asked.keep is not None:
            await self._removal.surplus(caller, full, asked.keep)
        return adapter, created

    async def tried(
        self, request: Request, caller: Caller, asked: Fetch, folder: Path, *, expected: int | None
    ) -> dict[str, Any]:
        """What a push would make of the adapter in `folder`; `version` is the one that has these bytes, if any."""
        full = full_name(caller.tenant, check_name(asked.name))
        request.state.subject = f"{full} (dry run)"
        place = await self._admission.place(full, promote=asked.promote)
        new, checks = await self._lifecycle.try_push(
            full,
            folder,
            quota=caller.limits,
            engine=asked.engine,
            expected=expected,
            min_effect=asked.probe_min_effect if asked.probe else ANY_EFFECT,
            conversion_error=asked.conversion_error,
        )
        versions = self._lifecycle.registry.versions(full) if full in self._lifecycle.registry else []
        there = next((version for version in versions if version.digest == new.digest), None)
        if "base_model" in checks and not caller.operator:
            checks["base_model"] = new.base.name
        return {
            "object": "adapter.check",
            "dry_run": True,
            "name": asked.name,
            "version": there.version if there else None,
            "becomes": place.value,
            "digest": new.digest,
            "engine": new.base.name,
            "base": new.inspection.base,
            "rank": new.inspection.rank,
            "target_modules": list(new.inspection.target_modules),
            "bytes": new.inspection.nbytes,
            "provenance": provenance_of(checks),
            "checks": measured(checks),
        }


def stated_bytes(request: Request) -> int:
    """How many bytes the client says are coming; 0 if it does not."""
    stated = request.headers.get("content-length", "")
    return int(stated) if stated.isascii() and stated.isdigit() and len(stated) < 20 else 0


async def received(
    request: Request, folder: Path, room: Room, config: Config, caller: Caller
) -> tuple[Fetch, Source | None]:
    """What a push asks for, in any form of its body, and where its files were fetched; they are in `folder` then."""
    kind = request.headers.get("content-type", "")
    media = kind.partition(";")[0].strip().lower()
    if media == "application/json":
        return await _by_address(request, folder, room, config, caller)
    if media in KINDS:
        asked = _fields(request, dict(request.query_params))
        header = request.headers.get(CONFIG_HEADER)
        await receive_tensors(
            request.stream(),
            None if header is None else header.encode("latin-1"),
            folder,
            room,
            max_bytes=config.max_upload_bytes,
        )
        return asked, None
    form = await receive(request.stream(), kind, folder, room, max_bytes=config.max_upload_bytes)
    return _fields(request, form), None


def _fields(request: Request, form: Mapping[str, str]) -> Fetch:
    """The fields of a form, or of a query."""
    request.state.subject = form.get("name")
    if not form.get("name"):
        raise BadRequest("the upload has no field `name`: say which adapter this is a version of", param="name")
    visibility = form.get("visibility")
    if visibility not in (None, "private", "shared"):
        raise BadRequest(f"visibility takes private or shared, not {shown(visibility)}", param="visibility")
    fields: dict[str, Any] = {name: form[name] for name in _FIELDS if name in form}
    switches = {name: _switch(form, name, default) for name, default in _SWITCHES.items()}
    return converted({**fields, **switches, "source": ""}, Fetch)


def _switch(form: Mapping[str, str], name: str, default: str) -> bool:
    value = form.get(name, default).lower()
    if value not in ("true", "false"):
        raise BadRequest(f"{name} takes true or false, not {shown(value, 40)!r}", param=name)
    return value == "true"


async def _by_address(
    request: Request, folder: Path, room: Room, config: Config, caller: Caller
) -> tuple[Fetch, Source]:
    """A push whose files the server goes and gets."""
    asked = decoded(await request.body(), Fetch)
    request.state.subject = check_name(asked.name)
    came = await fetched(asked.source, folder, room, config, caller)
    return msgspec.structs.replace(asked, why=asked.why or f"from {came.read}"), came


async def fetched(address: str, folder: Path, room: Room, config: Config, caller: Caller) -> Source:
    """The adapter's files at an address, in `folder`; where they came from.

    The server's own credentials, folders and neighbours are there for tenant `default` alone: through them another
    tenant could read what is none of its business, so for that one the server sees only what is public.
    """
    trusted = caller.tenant == DEFAULT
    source = parse(
        address,
        map(Path, config.source_roots if trusted else ()),
        config.source_hosts if trusted else (),
        trusted=trusted,
    )
    return await asyncio.to_thread(
        fetch,
        source,
        folder,
        room,
        max_bytes=config.max_upload_bytes,
        anonymous=not trusted,
    )
