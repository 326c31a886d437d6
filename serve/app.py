"""`build_app()`: who is who, the lifespan, and thin routes. Read this first.

a request:   app > auth > limits > router > engine > tap > monitor
an upload:   app > auth > upload > adapter > store > engine > registry
"""

import asyncio
import dataclasses
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect

from serve import __version__
from serve.adapter import Adapter, check_name, shown
from serve.adapter import Limits as AdapterLimits
from serve.audit import Audit, Audited
from serve.auth import Auth, Caller, Scope, allowed
from serve.config import Config
from serve.engine import Backend, Engine
from serve.errors import BadRequest, Conflict, EngineUnavailable, LoradockError, NotFound, TooLarge
from serve.export import gist
from serve.fleet import Fleet, Patience, Supervisor
from serve.inference import PATHS, STORED, Inference
from serve.keys import Keys
from serve.lifecycle import Lifecycle
from serve.limits import Limits, Meters
from serve.monitor import Monitor
from serve.probe import Probe
from serve.registry import Registry, Share
from serve.router import Router, manages, sees
from serve.shadow import ShadowExchange, Shadows
from serve.source import fetch, parse
from serve.store import Store
from serve.tenant import DEFAULT, full_name, short_name, spelled, tenant_of
from serve.upload import receive

log = logging.getLogger(__name__)

LOG_STATS_SECONDS = 10.0
MAX_JSON = 64 << 10


class Fetch(BaseModel):
    """A push as JSON: the server fetches the adapter from `source`."""

    model_config = ConfigDict(extra="forbid")
    name: str
    source: str
    promote: bool = True
    visibility: Literal["private", "shared"] | None = None
    why: str = ""


class Promote(BaseModel):
    """The body of a promote."""

    model_config = ConfigDict(extra="forbid")
    version: PositiveInt
    expected_version: int | None = None
    why: str = ""


class Weight(BaseModel):
    """The body of a canary or a shadow: a version's share of the name's traffic; 0 ends it."""

    model_config = ConfigDict(extra="forbid")
    version: PositiveInt
    weight: float
    why: str = ""


class Pin(BaseModel):
    """The body of a pin; without a version, whichever is live stays."""

    model_config = ConfigDict(extra="forbid")
    version: PositiveInt | None = None
    why: str = ""


class Rollback(BaseModel):
    """The body of a rollback; may be left out."""

    model_config = ConfigDict(extra="forbid")
    expected_version: int | None = None
    why: str = ""


class LimitsOfKey(BaseModel):
    """What a key may use; null is unlimited."""

    model_config = ConfigDict(extra="forbid", strict=True)
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent: int | None = None
    adapters: int | None = None
    adapter_bytes: int | None = None


class NewKey(BaseModel):
    """The body of a key's creation."""

    model_config = ConfigDict(extra="forbid")
    name: str
    tenant: str = DEFAULT
    scopes: list[str] = [Scope.INFERENCE]
    limits: LimitsOfKey = LimitsOfKey()


def build_app(
    config: Config,
    backend: Backend,
    on_failure: Callable[[LoradockError], None] | None = None,
    on_shadow: Callable[[ShadowExchange], None] | None = None,
) -> FastAPI:
    """The whole server over `backend`; `on_failure` hears of an engine that cannot start.

    `on_shadow` gets every request that a shadow answered too, with both answers.
    """
    store = Store(config.data_dir)
    registry = Registry(config.registry_url)

    def make_probe(engine: Engine) -> Probe | None:
        if not config.probe:
            return None
        return Probe(engine, min_effect=config.probe_min_effect, max_perplexity=config.probe_max_perplexity)

    async def restore(base: Supervisor, engine: Engine) -> None:
        await lifecycle.restore(base, engine)

    patience = Patience(**{one.name: getattr(config, one.name) for one in dataclasses.fields(Patience)})
    fleet = Fleet([Supervisor(backend, restore, make_probe, patience)])
    lifecycle = Lifecycle(fleet, registry, store, lambda base: _limits(config, base.backend))
    keys = Keys(registry)
    auth = Auth(config.api_keys, config.admin_keys, keys.caller, lambda: keys.any)
    audit = Audit(config.data_dir / "audit.jsonl")
    monitor = Monitor(fleet, registry, audit, __version__)
    shadows = Shadows(fleet, store, monitor.shadowed, on_shadow, limit=config.max_shadows)
    inference = Inference(auth, Router(fleet, registry, store), Meters(), monitor.take, shadows)

    async def live() -> None:
        try:
            await lifecycle.sweep()
            await fleet.start()
            ready.set()
        except LoradockError as error:
            (on_failure or log.error)(error)

    async def log_stats() -> None:
        while True:
            await asyncio.sleep(LOG_STATS_SECONDS)
            for base in fleet:
                with suppress(EngineUnavailable):
                    await base.backend.log_stats()

    ready = asyncio.Event()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(live()), asyncio.create_task(log_stats())]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await shadows.close()
            await lifecycle.settle()
            await fleet.stop()
            registry.close()

    app = FastAPI(
        title="loradock",
        version=__version__,
        lifespan=lifespan,
        middleware=[Middleware(_Split, inference=inference), Middleware(Audited, audit=audit)],
        docs_url=None,
        redoc_url=None,
    )
    app.add_exception_handler(LoradockError, _answer)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(ClientDisconnect, _answer_nobody)

    def holds(scope: Scope) -> Any:
        async def caller(request: Request) -> Caller:
            request.state.caller = known = auth.known(request.headers)
            return allowed(known, scope)

        return Depends(caller)

    Asker = Annotated[Caller, holds(Scope.INFERENCE)]
    Manager = Annotated[Caller, holds(Scope.ADAPTERS)]
    Operator = Annotated[Caller, holds(Scope.ADMIN)]

    def owned(name: str, caller: Caller) -> str:
        """The full name of an adapter that the caller may change; of any other, whatever it is, the same 404."""
        full = spelled(name, caller.tenant)
        if full not in registry or not manages(caller, full):
            raise NotFound(f"The adapter `{shown(name)}` does not exist.", code="model_not_found", param="name")
        return full

    def described(adapter: Adapter, caller: Caller) -> dict[str, Any]:
        return {**lifecycle.describe(adapter), "name": short_name(adapter.name, caller.tenant)}

    def summary(full: str, caller: Caller) -> dict[str, Any]:
        live = registry.live(full)
        return {
            "object": "adapter",
            "name": short_name(full, caller.tenant),
            "tenant": tenant_of(full),
            "visibility": "shared" if registry.shared(full) else "private",
            "live": live.version if live else None,
            "canary": _share(registry.canary(full)),
            "shadow": _share(registry.shadow(full)),
            "versions": [described(version, caller) for version in registry.versions(full)],
        }

    @app.get("/health")
    async def health() -> Response:
        """This process lives."""
        return Response()

    @app.get("/ready")
    async def is_ready() -> Response:
        """Every engine answers."""
        for base in fleet:
            if not base.is_ready:
                raise base.unavailable()
        return JSONResponse({"status": "ready", "model": fleet.first.name})

    @app.get("/version")
    async def version() -> dict[str, Any]:
        said = {"version": __version__, "vllm": fleet.first.backend.version, "model": fleet.first.name}
        manifest = gist(fleet.first.model)
        return {**said, "manifest": manifest} if manifest else said

    @app.get("/metrics")
    async def metrics(caller: Operator) -> Response:
        text = await asyncio.to_thread(monitor.render)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models(caller: Asker) -> dict[str, Any]:
        return {"object": "list", "data": list(_cards(fleet, registry, caller))}

    @app.get("/v1/models/{name:path}")
    async def model(name: str, caller: Asker) -> dict[str, Any]:
        for card in _cards(fleet, registry, caller):
            if name == card["id"]:
                return card
        raise NotFound(f"The model `{name}` does not exist", code="model_not_found", param="model")

    @app.get("/v1/engines")
    async def engines(caller: Operator) -> dict[str, Any]:
        rows = []
        for base in fleet:
            # The backend answers behind what it computes, so the other numbers are read afterwards.
            resident = sorted(await base.resident_ids()) if base.is_ready else []
            rows.append({**base.described(), "resident": resident})
        return {"object": "list", "data": rows}

    @app.post("/v1/engines/{engine}/restart")
    async def restart(engine: str, request: Request, caller: Operator) -> dict[str, Any]:
        request.state.subject = engine
        await fleet.get(engine).restart()
        return fleet.get(engine).described()

    @app.post("/v1/adapters", status_code=201)
    async def push(request: Request, caller: Manager) -> Response:
        if not ready.is_set():
            raise fleet.first.unavailable()
        kind = request.headers.get("content-type", "")
        with store.quarantine() as folder:
            if kind.partition(";")[0].strip().lower() == "application/json":
                asked = await _fetched(request, folder, config, caller)
            else:
                asked = await _received(request, kind, folder, config)
            adapter, created = await lifecycle.push(
                full_name(caller.tenant, check_name(asked.name)),
                folder,
                by=caller.name,
                promote=asked.promote,
                why=asked.why,
                shared=None if asked.visibility is None else asked.visibility == "shared",
                quota=caller.limits,
            )
        request.state.subject = adapter.tag
        return JSONResponse(described(adapter, caller), status_code=201 if created else 200)

    @app.get("/v1/adapters")
    async def adapters(caller: Manager) -> dict[str, Any]:
        rows = [summary(full, caller) for full in registry.names() if manages(caller, full)]
        return {"object": "list", "data": rows}

    @app.get("/v1/adapters/{name:path}")
    async def adapter(name: str, caller: Manager) -> dict[str, Any]:
        full = owned(name, caller)
        return {**summary(full, caller), "history": registry.history(full)}

    @app.post("/v1/adapters/{name:path}/promote")
    async def promote(name: str, body: Promote, request: Request, caller: Manager) -> dict[str, Any]:
        request.state.subject = f"{spelled(name, caller.tenant)}@v{body.version}"
        full = owned(name, caller)
        done = await lifecycle.promote(full, body.version, by=caller.name, expected=body.expected_version, why=body.why)
        monitor.swaps.labels(full, "promoted").inc()
        return described(done, caller)

    @app.post("/v1/adapters/{name:path}/rollback")
    async def rollback(name: str, request: Request, caller: Manager, body: Rollback | None = None) -> dict[str, Any]:
        body = body or Rollback()
        request.state.subject = spelled(name, caller.tenant)
        full = owned(name, caller)
        done = await lifecycle.rollback(full, by=caller.name, expected=body.expected_version, why=body.why)
        request.state.subject = done.tag
        monitor.swaps.labels(full, "rolled_back").inc()
        return described(done, caller)

    @app.post("/v1/adapters/{name:path}/canary")
    async def canary(name: str, body: Weight, request: Request, caller: Manager) -> dict[str, Any]:
        request.state.subject = f"{spelled(name, caller.tenant)}@v{body.version}"
        full = owned(name, caller)
        await lifecycle.share(full, "canary", body.version, body.weight, by=caller.name, why=body.why)
        return summary(full, caller)

    @app.post("/v1/adapters/{name:path}/shadow")
    async def shadow(name: str, body: Weight, request: Request, caller: Manager) -> dict[str, Any]:
        request.state.subject = f"{spelled(name, caller.tenant)}@v{body.version}"
        full = owned(name, caller)
        await lifecycle.share(full, "shadow", body.version, body.weight, by=caller.name, why=body.why)
        return summary(full, caller)

    @app.post("/v1/adapters/{name:path}/pin")
    async def pin(name: str, request: Request, caller: Manager, body: Pin | None = None) -> dict[str, Any]:
        body = body or Pin()
        request.state.subject = spelled(name, caller.tenant) + (f"@v{body.version}" if body.version else "")
        full = owned(name, caller)
        await lifecycle.pin(full, body.version, by=caller.name, why=body.why)
        return summary(full, caller)

    @app.delete("/v1/adapters/{name:path}/pin")
    async def unpin(name: str, request: Request, caller: Manager) -> dict[str, Any]:
        request.state.subject = spelled(name, caller.tenant)
        full = owned(name, caller)
        await lifecycle.unpin(full, by=caller.name)
        return summary(full, caller)

    @app.delete("/v1/adapters/{name:path}/versions/{number}")
    async def remove_version(
        name: str, number: int, request: Request, caller: Manager, force: bool = False
    ) -> dict[str, Any]:
        request.state.subject = f"{spelled(name, caller.tenant)}@v{number}"
        gone = await lifecycle.remove(owned(name, caller), number, by=caller.name, force=force)
        return {"name": name, "deleted": [one.version for one in gone]}

    @app.delete("/v1/adapters/{name:path}")
    async def remove(name: str, request: Request, caller: Manager) -> dict[str, Any]:
        request.state.subject = spelled(name, caller.tenant)
        gone = await lifecycle.remove(owned(name, caller), by=caller.name)
        return {"name": name, "deleted": [one.version for one in gone]}

    @app.post("/v1/keys", status_code=201)
    async def create_key(body: NewKey, request: Request, caller: Operator) -> dict[str, Any]:
        request.state.subject = f"{body.tenant}/{body.name}"
        if auth.open:
            raise Conflict(
                "this server has no key, so everybody may do everything: "
                "start it with LORADOCK_ADMIN_KEYS, then create keys with that one"
            )
        limits = Limits(**body.limits.model_dump())
        key, secret = await asyncio.to_thread(keys.create, body.tenant, body.name, body.scopes, limits)
        request.state.subject = f"{body.tenant}/{body.name} {key.id}"
        return {**key.described(), "secret": secret}

    @app.get("/v1/keys")
    async def list_keys(caller: Operator, tenant: str | None = None) -> dict[str, Any]:
        rows = [key.described() for key in keys.all() if tenant in (None, key.tenant)]
        return {"object": "list", "data": rows}

    @app.delete("/v1/keys/{id}")
    async def revoke_key(id: str, request: Request, caller: Operator) -> dict[str, Any]:
        key = await asyncio.to_thread(keys.revoke, id)
        request.state.subject = f"{key.tenant}/{key.name} {key.id}"
        return key.described()

    app.state.fleet, app.state.engine, app.state.ready = fleet, fleet.first, ready
    return app


class _Split:
    """Sends inference straight to its endpoint: no other middleware or route stands between a token and the socket."""

    def __init__(self, app: Any, inference: Inference) -> None:
        self._app = app
        self._inference = inference

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope.get("path", "")
        inference = scope["type"] == "websocket" or PATHS.fullmatch(path) or STORED.fullmatch(path)
        await (self._inference if inference else self._app)(scope, receive, send)


def _limits(config: Config, backend: Backend) -> AdapterLimits:
    """What an upload may be, here."""
    rank = backend.max_lora_rank
    return AdapterLimits(
        max_rank=min(rank, config.max_adapter_rank or rank),
        allowed_target_modules=frozenset(config.allowed_target_modules) or None,
        allowed_licenses=frozenset(one.lower() for one in config.allowed_licenses) or None,
        allowed_digests=frozenset(config.allowed_digests) or None,
    )


async def _received(request: Request, kind: str, folder: Path, config: Config) -> Fetch:
    """A push whose files come with it."""
    licensed = bool(config.allowed_licenses)
    form = await receive(request.stream(), kind, folder, max_bytes=config.max_upload_bytes, card=licensed)
    request.state.subject = form.get("name")
    if not form.get("name"):
        raise BadRequest("the upload has no field `name`: say which adapter this is a version of", param="name")
    promote = form.get("promote", "true").lower()
    if promote not in ("true", "false"):
        raise BadRequest(f"promote takes true or false, not {promote!r}", param="promote")
    visibility = form.get("visibility")
    if visibility not in (None, "private", "shared"):
        raise BadRequest(f"visibility takes private or shared, not {shown(visibility)}", param="visibility")
    why = form.get("why", "")
    return Fetch(name=form["name"], source="", promote=promote == "true", visibility=visibility, why=why)  # type: ignore[arg-type]


async def _fetched(request: Request, folder: Path, config: Config, caller: Caller) -> Fetch:
    """A push whose files the server goes and gets.

    Its own credentials and folders are there for tenant `default` alone: through them another tenant could read what
    is none of its business, so for that one the server sees only what is public.
    """
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_JSON:
            raise TooLarge(f"a push as JSON takes up to {MAX_JSON} bytes; send files as multipart/form-data")
    try:
        asked = Fetch.model_validate_json(body)
    except ValidationError as error:
        raise _invalid(error.errors()) from error
    request.state.subject = check_name(asked.name)
    trusted = caller.tenant == DEFAULT
    source = parse(asked.source, map(Path, config.source_roots if trusted else ()))
    await asyncio.to_thread(
        fetch,
        source,
        folder,
        max_bytes=config.max_upload_bytes,
        card=bool(config.allowed_licenses),
        anonymous=not trusted,
    )
    return asked.model_copy(update={"why": asked.why or f"from {asked.source}"})


def _share(share: Share | None) -> dict[str, Any] | None:
    return {"version": share.adapter.version, "weight": share.weight} if share else None


def _cards(fleet: Fleet, registry: Registry, caller: Caller) -> Iterator[dict[str, Any]]:
    """OpenAI's model cards: the bases, then every adapter that the caller may ask, by name and by version."""
    for base in fleet:
        card = {"id": base.name, "object": "model", "created": 0, "owned_by": "loradock", "root": base.model}
        card |= {"parent": None, "max_model_len": base.backend.max_model_len} if base.is_ready else {"parent": None}
        yield {**card, "manifest": manifest} if (manifest := gist(base.model)) else card
    for full in registry.names():
        if not sees(registry, caller, full):
            continue
        public = short_name(full, caller.tenant)
        if tenant_of(full) == DEFAULT and full_name(caller.tenant, full) in registry and caller.tenant != DEFAULT:
            public = f"{DEFAULT}/{full}"  # the caller's own adapter answers under the short name
        live = registry.live(full)
        for adapter in registry.versions(full):
            pinned = f"{public}@v{adapter.version}"
            for id in [public, pinned] if adapter == live else [pinned]:
                yield {
                    "id": id,
                    "object": "model",
                    "created": int(adapter.created),
                    "owned_by": "loradock",
                    "root": adapter.id,
                    "parent": fleet.of(full).name,
                }


async def _answer(request: Request, error: Exception) -> Response:
    assert isinstance(error, LoradockError)
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers())


async def _answer_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    kind = "not_found_error" if error.status_code == 404 else "invalid_request_error"
    body = {"error": {"message": message, "type": kind, "param": None, "code": None}}
    return JSONResponse(body, status_code=error.status_code, headers=error.headers)


async def _answer_nobody(request: Request, error: Exception) -> Response:
    """The client left in the middle of its request: nobody reads this."""
    return Response(status_code=499)


async def _answer_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return JSONResponse(_invalid(error.errors()).body(), status_code=400)


def _invalid(errors: Sequence[Any]) -> BadRequest:
    where = ".".join(str(part) for part in errors[0]["loc"] if part != "body") or "the body"
    return BadRequest(f"{where}: {errors[0]['msg']}", param=where)
