"""`build_app()`: who is who, the lifespan, and thin routes. Read this first.

a request:   app > auth > router > engine > tap > monitor
an upload:   app > auth > upload > adapter > store > engine > registry
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from serve import __version__
from serve.adapter import Limits, check_name
from serve.auth import Auth, Caller, Scope
from serve.base import lora_modules
from serve.config import Config
from serve.engine import Backend, Engine, Phase
from serve.errors import BadRequest, EngineUnavailable, LoradockError, NotFound, TooLarge
from serve.inference import PATHS, STORED, Inference
from serve.lifecycle import Lifecycle
from serve.monitor import Monitor
from serve.probe import Probe
from serve.registry import Registry, Share
from serve.router import Router
from serve.shadow import ShadowExchange, Shadows
from serve.source import fetch, parse
from serve.store import Store
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


def build_app(
    config: Config,
    backend: Backend,
    on_failure: Callable[[LoradockError], None] | None = None,
    on_shadow: Callable[[ShadowExchange], None] | None = None,
) -> FastAPI:
    """The whole server over `backend`; `on_failure` hears of an engine that cannot start or has died.

    `on_shadow` gets every request that a shadow answered too, with both answers.
    """
    engine = Engine(backend)
    store = Store(config.data_dir)
    registry = Registry(config.registry_url)
    modules: dict[str, tuple[int, int]] = {}
    judge = Probe(engine, min_effect=config.probe_min_effect, max_perplexity=config.probe_max_perplexity)
    probe = judge if config.probe else None
    lifecycle = Lifecycle(engine, registry, store, lambda: modules, probe, lambda: _limits(config, backend))
    auth = Auth(config.api_keys, config.admin_keys)
    monitor = Monitor(engine, registry, __version__)
    shadows = Shadows(engine, store, monitor.shadowed, on_shadow, limit=config.max_shadows)
    inference = Inference(auth, Router(engine, registry, store), monitor.take, shadows)

    async def start() -> None:
        await engine.start()
        modules.update(await asyncio.to_thread(lora_modules, config.model))
        if probe:
            await probe.start()
        await lifecycle.restore()
        ready.set()

    async def live() -> None:
        try:
            await start()
            while not backend.dead:
                await asyncio.sleep(1)
            raise EngineUnavailable("the engine process has died: its log above says why")
        except LoradockError as error:
            engine.phase = Phase.FAILED
            ready.clear()
            (on_failure or log.error)(error)

    async def log_stats() -> None:
        while True:
            await asyncio.sleep(LOG_STATS_SECONDS)
            with suppress(EngineUnavailable):
                await backend.log_stats()

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
            await engine.stop()
            registry.close()

    app = FastAPI(
        title="loradock",
        version=__version__,
        lifespan=lifespan,
        middleware=[Middleware(_Split, inference=inference)],
        docs_url=None,
        redoc_url=None,
    )
    app.add_exception_handler(LoradockError, _answer)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(RequestValidationError, _answer_invalid)

    def infers(request: Request) -> Caller:
        return auth.caller(request.headers, Scope.INFERENCE)

    def administers(request: Request) -> Caller:
        return auth.caller(request.headers, Scope.ADMIN)

    Admin = Annotated[Caller, Depends(administers)]

    async def residents() -> set[str]:
        return await lifecycle.resident() if engine.phase is Phase.READY else set()

    @app.get("/health")
    async def health() -> Response:
        """This process lives."""
        return Response()

    @app.get("/ready")
    async def is_ready() -> Response:
        """An engine answers."""
        if not ready.is_set() or backend.dead:
            raise EngineUnavailable(f"the engine for {engine.name} is {engine.phase}")
        return JSONResponse({"status": "ready", "model": engine.name})

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__, "vllm": backend.version, "model": engine.name}

    @app.get("/metrics")
    async def metrics(caller: Admin) -> Response:
        text = await asyncio.to_thread(monitor.render)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models(caller: Annotated[Caller, Depends(infers)]) -> dict[str, Any]:
        return {"object": "list", "data": list(_cards(engine, registry, config.model))}

    @app.get("/v1/models/{name}")
    async def model(name: str, caller: Annotated[Caller, Depends(infers)]) -> dict[str, Any]:
        for card in _cards(engine, registry, config.model):
            if name == card["id"]:
                return card
        raise NotFound(f"The model `{name}` does not exist", code="model_not_found", param="model")

    @app.get("/v1/engines")
    async def engines(caller: Admin) -> dict[str, Any]:
        row = {
            "object": "engine",
            "name": engine.name,
            "phase": engine.phase,
            "model": config.model,
            "leases": engine.leases,
            "running": backend.running,
            "resident": sorted(await residents()),
            "max_resident": backend.max_resident,
        }
        return {"object": "list", "data": [row]}

    @app.post("/v1/adapters", status_code=201)
    async def push(request: Request, caller: Admin) -> Response:
        if not ready.is_set():
            raise EngineUnavailable(f"the engine for {engine.name} is {engine.phase}: push again when /ready says so")
        kind = request.headers.get("content-type", "")
        with store.quarantine() as folder:
            if kind.partition(";")[0].strip().lower() == "application/json":
                asked = await _fetched(request, folder, config)
            else:
                asked = await _received(request, kind, folder, config)
            adapter, created = await lifecycle.push(
                asked.name, folder, by=caller.name, promote=asked.promote, why=asked.why
            )
        body = lifecycle.describe(adapter, await residents())
        return JSONResponse(body, status_code=201 if created else 200)

    @app.get("/v1/adapters")
    async def adapters(caller: Admin) -> dict[str, Any]:
        resident = await residents()
        rows = [_summary(lifecycle, registry, name, resident) for name in registry.names()]
        return {"object": "list", "data": rows}

    @app.get("/v1/adapters/{name}")
    async def adapter(name: str, caller: Admin) -> dict[str, Any]:
        return {**_summary(lifecycle, registry, name, await residents()), "history": registry.history(name)}

    @app.post("/v1/adapters/{name}/promote")
    async def promote(name: str, body: Promote, caller: Admin) -> dict[str, Any]:
        done = await lifecycle.promote(name, body.version, by=caller.name, expected=body.expected_version, why=body.why)
        monitor.swaps.labels(name, "promoted").inc()
        return lifecycle.describe(done, await residents())

    @app.post("/v1/adapters/{name}/rollback")
    async def rollback(name: str, caller: Admin, body: Rollback | None = None) -> dict[str, Any]:
        body = body or Rollback()
        done = await lifecycle.rollback(name, by=caller.name, expected=body.expected_version, why=body.why)
        monitor.swaps.labels(name, "rolled_back").inc()
        return lifecycle.describe(done, await residents())

    @app.post("/v1/adapters/{name}/canary")
    async def canary(name: str, body: Weight, caller: Admin) -> dict[str, Any]:
        await lifecycle.share(name, "canary", body.version, body.weight, by=caller.name, why=body.why)
        return _summary(lifecycle, registry, name, await residents())

    @app.post("/v1/adapters/{name}/shadow")
    async def shadow(name: str, body: Weight, caller: Admin) -> dict[str, Any]:
        await lifecycle.share(name, "shadow", body.version, body.weight, by=caller.name, why=body.why)
        return _summary(lifecycle, registry, name, await residents())

    @app.post("/v1/adapters/{name}/pin")
    async def pin(name: str, caller: Admin, body: Pin | None = None) -> dict[str, Any]:
        body = body or Pin()
        await lifecycle.pin(name, body.version, by=caller.name, why=body.why)
        return _summary(lifecycle, registry, name, await residents())

    @app.delete("/v1/adapters/{name}/pin")
    async def unpin(name: str, caller: Admin) -> dict[str, Any]:
        await lifecycle.unpin(name, by=caller.name)
        return _summary(lifecycle, registry, name, await residents())

    @app.delete("/v1/adapters/{name}")
    async def remove(name: str, caller: Admin) -> dict[str, Any]:
        gone = await lifecycle.remove(name, by=caller.name)
        return {"name": name, "deleted": [one.version for one in gone]}

    @app.delete("/v1/adapters/{name}/versions/{number}")
    async def remove_version(name: str, number: int, caller: Admin, force: bool = False) -> dict[str, Any]:
        gone = await lifecycle.remove(name, number, by=caller.name, force=force)
        return {"name": name, "deleted": [one.version for one in gone]}

    app.state.engine, app.state.ready = engine, ready
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


def _limits(config: Config, backend: Backend) -> Limits:
    """What an upload may be, here."""
    rank = backend.max_lora_rank
    return Limits(
        max_rank=min(rank, config.max_adapter_rank or rank),
        allowed_target_modules=frozenset(config.allowed_target_modules) or None,
        allowed_licenses=frozenset(one.lower() for one in config.allowed_licenses) or None,
        allowed_digests=frozenset(config.allowed_digests) or None,
    )


async def _received(request: Request, kind: str, folder: Path, config: Config) -> Fetch:
    """A push whose files come with it."""
    licensed = bool(config.allowed_licenses)
    form = await receive(request.stream(), kind, folder, max_bytes=config.max_upload_bytes, card=licensed)
    if not form.get("name"):
        raise BadRequest("the upload has no field `name`: say which adapter this is a version of", param="name")
    promote = form.get("promote", "true").lower()
    if promote not in ("true", "false"):
        raise BadRequest(f"promote takes true or false, not {promote!r}", param="promote")
    return Fetch(name=form["name"], source="", promote=promote == "true", why=form.get("why", ""))


async def _fetched(request: Request, folder: Path, config: Config) -> Fetch:
    """A push whose files the server goes and gets."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_JSON:
            raise TooLarge(f"a push as JSON takes up to {MAX_JSON} bytes; send files as multipart/form-data")
    try:
        asked = Fetch.model_validate_json(body)
    except ValidationError as error:
        raise _invalid(error.errors()) from error
    check_name(asked.name)
    source = parse(asked.source, map(Path, config.source_roots))
    licensed = bool(config.allowed_licenses)
    await asyncio.to_thread(fetch, source, folder, max_bytes=config.max_upload_bytes, card=licensed)
    return asked.model_copy(update={"why": asked.why or f"from {asked.source}"})


def _summary(lifecycle: Lifecycle, registry: Registry, name: str, resident: set[str]) -> dict[str, Any]:
    versions = registry.versions(name)
    live = registry.live(name)
    return {
        "object": "adapter",
        "name": name,
        "live": live.version if live else None,
        "canary": _share(registry.canary(name)),
        "shadow": _share(registry.shadow(name)),
        "versions": [lifecycle.describe(version, resident) for version in versions],
    }


def _share(share: Share | None) -> dict[str, Any] | None:
    return {"version": share.adapter.version, "weight": share.weight} if share else None


def _cards(engine: Engine, registry: Registry, model: str) -> Any:
    """OpenAI's model cards: the base, then every adapter by name and by version."""
    base = {"id": engine.name, "object": "model", "created": 0, "owned_by": "loradock", "root": model, "parent": None}
    if engine.phase is Phase.READY:
        base["max_model_len"] = engine.backend.max_model_len
    yield base
    for name in registry.names():
        live = registry.live(name)
        for adapter in registry.versions(name):
            ids = [name, adapter.tag] if adapter == live else [adapter.tag]
            for public in ids:
                yield {
                    "id": public,
                    "object": "model",
                    "created": int(adapter.created),
                    "owned_by": "loradock",
                    "root": adapter.id,
                    "parent": engine.name,
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


async def _answer_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return JSONResponse(_invalid(error.errors()).body(), status_code=400)


def _invalid(errors: Sequence[Any]) -> BadRequest:
    where = ".".join(str(part) for part in errors[0]["loc"] if part != "body") or "the body"
    return BadRequest(f"{where}: {errors[0]['msg']}", param=where)
