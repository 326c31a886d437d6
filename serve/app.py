"""`build_app()`: who is who, the lifespan, and thin routes. Read this first.

a request:   app > auth > limits > router > engine > tap > monitor
an upload:   app > auth > upload > adapter > store > engine > registry
"""

import asyncio
import dataclasses
import hashlib
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect

from serve import __version__
from serve.adapter import Adapter, check_name, shown
from serve.adapter import Limits as AdapterLimits
from serve.alerts import Alerts, Notification
from serve.audit import Audit, Audited
from serve.auth import Auth, Caller, Scope, allowed
from serve.blobs import Blobs
from serve.capture import Capture
from serve.checkpoint import find
from serve.config import Config
from serve.embedding import Embedding
from serve.engine import Backend, Engine
from serve.errors import BadRequest, ConfigError, Conflict, EngineUnavailable, LoradockError, NotFound, TooLarge
from serve.export import gist
from serve.feedback import GOOD, Feedback
from serve.fleet import Fleet, Patience, Supervisor
from serve.follower import Follower, Replica
from serve.inference import PATHS, STORED, Inference
from serve.keys import Keys
from serve.lifecycle import Lifecycle
from serve.limits import Limits, Meters
from serve.machine import node
from serve.monitor import Monitor
from serve.page import pages
from serve.policy import ROLLBACK
from serve.probe import Probe
from serve.prober import Prober
from serve.recent import Recent
from serve.referee import Referee
from serve.registry import Registry, Share
from serve.rehearsal import Rehearsal
from serve.router import Router, manages, sees
from serve.shadow import ShadowExchange, Shadows
from serve.source import fetch, parse
from serve.store import Store
from serve.tenant import DEFAULT, full_name, short_name, spelled, tenant_of
from serve.trial import Judgement, Trials
from serve.upload import receive
from serve.watcher import Watcher
from serve.wayback import Wayback

log = logging.getLogger(__name__)

LOG_STATS_SECONDS = 10.0
MAX_JSON = 64 << 10
MAX_BASELINE = 64 << 20


class Fetch(BaseModel):
    """A push as JSON: the server fetches the adapter from `source`."""

    model_config = ConfigDict(extra="forbid")
    name: str
    source: str
    promote: bool = True
    visibility: Literal["private", "shared"] | None = None
    engine: str | None = None
    why: str = ""


class Promote(BaseModel):
    """The body of a promote."""

    model_config = ConfigDict(extra="forbid")
    version: PositiveInt
    expected_version: int | None = None
    # Whatever the adapter's policy says of canaries.
    at_once: bool = False
    why: str = ""


class Rating(BaseModel):
    """The body of feedback: a rating from 0 to 1, or the correct answer."""

    model_config = ConfigDict(extra="forbid")
    request_id: str
    rating: float | None = None
    answer: str | None = None


class Rehearsed(BaseModel):
    """The body of a baseline: prompts, each a text or the messages of a chat, for a version or whichever is live."""

    model_config = ConfigDict(extra="forbid")
    version: PositiveInt | None = None
    prompts: list[str | list[dict[str, Any]]] = Field(min_length=20, max_length=10_000)
    max_tokens: PositiveInt = 64


class Acknowledged(BaseModel):
    """The body that says that a version's alarms have been dealt with."""

    model_config = ConfigDict(extra="forbid")
    version: PositiveInt


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


class Visibility(BaseModel):
    """Who may ask an adapter beside its own tenant: nobody, or everybody."""

    model_config = ConfigDict(extra="forbid")
    visibility: Literal["private", "shared"]
    why: str = ""


class Swap(BaseModel):
    """The body of a swap: the model that takes over, as `loradock serve` takes one."""

    model_config = ConfigDict(extra="forbid")
    model: str
    force: bool = False
    drain_first: bool = False


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
    backend: Backend | Sequence[Backend],
    on_failure: Callable[[LoradockError], None] | None = None,
    on_shadow: Callable[[ShadowExchange], None] | None = None,
    replica: str = "",
) -> FastAPI:
    """The whole server over `backend`, or several, one for each base model; the first answers who names none.

    `on_failure` hears of an engine that cannot start.

    `on_shadow` gets every request that a shadow answered too, with both answers.

    `replica` is this server's name among those that share its registry.
    """
    store = Store(config.data_dir, shared=Blobs(config.blobs) if config.blobs else None)
    registry = Registry(config.registry_url)

    def make_probe(engine: Engine) -> Probe | None:
        if not config.probe:
            return None
        return Probe(engine, min_effect=config.probe_min_effect, max_perplexity=config.probe_max_perplexity)

    async def meet(base: Supervisor, engine: Engine) -> None:
        engine.on_load = monitor.loaded
        # While another engine serves, this one is on trial for its place, and the traffic is the other's.
        if config.drift and not base.is_ready:
            await asyncio.to_thread(_learn, watcher, learned, base.name, engine.backend.model)

    def served(base: Supervisor, engine: Engine) -> None:
        if config.drift and learned.get(base.name) != engine.backend.model:
            learning.append(
                asyncio.create_task(asyncio.to_thread(_learn, watcher, learned, base.name, engine.backend.model))
            )

    learned: dict[str, str] = {}
    learning: list[asyncio.Task[None]] = []

    patience = Patience(**{one.name: getattr(config, one.name) for one in dataclasses.fields(Patience)})
    backends = backend if isinstance(backend, Sequence) else [backend]
    fleet = Fleet(
        [Supervisor(one, make_probe, patience, tolerance=config.swap_tolerance) for one in backends], registry.base
    )
    lifecycle = Lifecycle(fleet, registry, store, lambda base: _limits(config, base.backend))
    for one in fleet:
        one.on_serve = partial(served, one)
    lifecycle.meet = meet
    keys = Keys(registry)
    # A registry that has a URL of its own may have other servers too.
    me = Replica(replica or f"{node()}-{secrets.token_hex(4)}", node())
    follower = Follower(registry, keys, lifecycle, fleet, me) if config.registry else None
    auth = Auth(config.api_keys, config.admin_keys, keys.caller, lambda: keys.any)
    audit = Audit(config.data_dir / "audit.jsonl")
    monitor = Monitor(fleet, registry, audit, __version__, config.slos, limit=config.max_labelled_versions)
    wayback = Wayback(lifecycle, registry, audit, monitor.rolled_back)
    alerting = Alerts(wayback, registry, lambda adapter: referee.policy(adapter).worse == ROLLBACK)
    feedback = Feedback()
    trials = Trials(
        lambda adapter: registry.canary(adapter) if adapter in registry else None,
        lambda adapter: _live_version(registry, adapter),
        lambda adapter: referee.policy(adapter).alpha,
    )
    referee = Referee(wayback, lifecycle, registry, audit, trials, config.policies, monitor.swapped)

    def judged(judgement: Judgement) -> None:
        asyncio.run_coroutine_threadsafe(referee.decide(judgement), loops[0])

    loops: list[asyncio.AbstractEventLoop] = []
    watcher = Watcher(
        config.data_dir / "drift",
        trials,
        threshold=config.drift_threshold,
        reference=config.drift_reference,
        interval=config.drift_interval,
        logprobs=config.drift_logprobs,
        versions=config.drift_versions,
        capture=config.capture,
        redact=config.capture_redact,
        keep_quotes=config.capture_hours * 3600,
        base_of=lambda adapter: adapter if adapter in fleet else fleet.of(adapter).name,
        label=monitor.label,
        alarmed=referee.alarmed,
        judged=judged,
    )
    monitor.watch(watcher)
    monitor.passed_on += [feedback.remember, watcher.offer]
    capture = Capture(
        config.data_dir / "captured",
        lambda adapter: (fleet.get(adapter) if adapter in fleet else fleet.of(adapter)).model,
        redact=config.capture_redact,
        hours=config.capture_hours,
    )
    if config.capture_text:
        monitor.passed_on.append(capture.offer)
    rehearsal = Rehearsal(fleet, store)
    prober = Prober(fleet, registry, store, watcher, referee.alarmed, interval=config.drift_probe_interval)
    shadows = Shadows(fleet, store, monitor.shadowed, on_shadow, limit=config.max_shadows)
    router = Router(fleet, registry, store, lifecycle.popularity.used)
    recent = Recent()
    monitor.passed_on.append(recent.take)
    inference = Inference(auth, router, Meters(), monitor.take, shadows, watcher.wants_logprobs, config.client_timeout)
    if follower:
        inference.fresh = follower.fresh

    async def live() -> None:
        try:
            await lifecycle.sweep()
            lifecycle.popularity.load(popular)
            await fleet.start(lifecycle)
            ready.set()
            await prober.run()
        except LoradockError as error:
            (on_failure or log.error)(error)

    async def log_stats() -> None:
        while True:
            await asyncio.sleep(LOG_STATS_SECONDS)
            for base in fleet:
                with suppress(EngineUnavailable):
                    await base.backend.log_stats()

    ready = asyncio.Event()
    popular = config.data_dir / "popular.json"

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loops[:] = [asyncio.get_running_loop()]
        jobs = [live(), log_stats(), lifecycle.keep_warm(popular)] + ([follower.run()] if follower else [])
        tasks = [asyncio.create_task(job) for job in jobs]
        if config.capture_text:
            capture.start()
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.to_thread(watcher.stop)
            await asyncio.to_thread(capture.stop)
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
    app.include_router(pages())
    app.add_exception_handler(LoradockError, _answer)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(ClientDisconnect, _answer_nobody)

    def holds(scope: Scope) -> Any:
        async def caller(request: Request) -> Caller:
            if follower:
                await follower.fresh()
            request.state.caller = known = auth.known(request.headers)
            return allowed(known, scope)

        return Depends(caller)

    def matched(request: Request) -> int | None:
        return live_expected(request.headers.get("if-match"))

    # The version that must be live for a change to be made; every change to an adapter takes it.
    Expected = Annotated[int | None, Depends(matched)]
    Asker = Annotated[Caller, holds(Scope.INFERENCE)]
    Manager = Annotated[Caller, holds(Scope.ADAPTERS)]
    Operator = Annotated[Caller, holds(Scope.ADMIN)]

    def owned(name: str, caller: Caller) -> str:
        """The full name of an adapter that the caller may change; of any other, whatever it is, the same 404."""
        full = spelled(name, caller.tenant)
        if full not in registry or not manages(caller, full):
            raise NotFound(f"The adapter `{shown(name)}` does not exist.", code="model_not_found", param="name")
        return full

    def baselined(full: str, version: int | None) -> Adapter:
        """The version that a baseline is about; without a number, the live one."""
        number = version or _live_version(registry, full)
        if number is None:
            raise Conflict("no version of this adapter is live: say which one the baseline is for", param="version")
        if not watcher.running:
            raise Conflict("drift is not watched on this server, so there is nothing to build a baseline for")
        return registry.get(full, number)

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
    async def metrics(request: Request, caller: Operator) -> Response:
        """Ours, and the engine's."""
        monitor.tidy()
        text, kind = await asyncio.to_thread(monitor.render, request.headers.get("accept", ""))
        return Response(text, headers={"content-type": kind})

    @app.get("/metrics/engine")
    async def engine_metrics(request: Request, caller: Operator) -> Response:
        """The engine's alone, with the series that grows."""
        text, kind = await asyncio.to_thread(monitor.render_engine, request.headers.get("accept", ""))
        return Response(text, headers={"content-type": kind})

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

    @app.get("/v1/replicas")
    async def replicas(caller: Operator) -> dict[str, Any]:
        """The servers that share this one's registry, and how far each has read it."""
        return {"object": "list", "data": await asyncio.to_thread(follower.replicas) if follower else []}

    @app.post("/v1/engines/{engine:path}/swap")
    async def swap(engine: str, body: Swap, request: Request, caller: Operator) -> dict[str, Any]:
        request.state.subject = f"{engine} -> {body.model}"
        base = fleet.get(engine)
        try:
            model = await asyncio.to_thread(find, body.model, config.cache_dir)
        except ConfigError as error:
            raise BadRequest(str(error), param="model") from error
        return await base.swap(model, by=caller.name, force=body.force, drain_first=body.drain_first)

    @app.post("/v1/engines/{engine:path}/restart")
    async def restart(engine: str, request: Request, caller: Operator) -> dict[str, Any]:
        request.state.subject = engine
        await fleet.get(engine).restart()
        return fleet.get(engine).described()

    @app.post("/v1/adapters", status_code=201)
    async def push(request: Request, caller: Manager, expected: Expected) -> Response:
        if not ready.is_set():
            raise fleet.first.unavailable()
        kind = request.headers.get("content-type", "")
        with store.quarantine(min(_stated(request), config.max_upload_bytes)) as folder:
            if kind.partition(";")[0].strip().lower() == "application/json":
                asked = await _fetched(request, folder, config, caller)
            else:
                asked = await _received(request, kind, folder, config)
            full = full_name(caller.tenant, check_name(asked.name))
            # By policy a version that follows another one gets a share of the traffic first.
            weight = referee.policy(full).canary_weight
            trying = asked.promote and weight > 0 and _live_version(registry, full) is not None
            adapter, created = await lifecycle.push(
                full,
                folder,
                by=caller.name,
                promote=asked.promote and not trying,
                why=asked.why,
                shared=None if asked.visibility is None else asked.visibility == "shared",
                quota=caller.limits,
                engine=asked.engine,
                expected=expected,
            )
        request.state.subject = adapter.tag
        if trying and _live_version(registry, full) != adapter.version:
            await lifecycle.share(full, "canary", adapter.version, weight, by=caller.name, why=asked.why)
        elif asked.promote and created:
            monitor.swapped(adapter.name, "promoted")
        return JSONResponse(described(adapter, caller), status_code=201 if created else 200)

    @app.get("/v1/adapters")
    async def adapters(caller: Manager) -> dict[str, Any]:
        rows = [summary(full, caller) for full in registry.names() if manages(caller, full)]
        return {"object": "list", "data": rows}

    @app.get("/v1/drift")
    async def drift(caller: Manager) -> dict[str, Any]:
        """What has moved, of everything that the caller may change; the base is the operator's."""
        found = await asyncio.to_thread(watcher.summary)
        rows = [
            {"name": short_name(full, caller.tenant), "versions": found[full]}
            for full in sorted(found)
            if (caller.operator if full in fleet else full in registry and manages(caller, full))
        ]
        return {"object": "list", "watching": watcher.running, "data": rows}

    @app.get("/v1/adapters/{name:path}/drift")
    async def adapter_drift(name: str, caller: Manager) -> dict[str, Any]:
        """What moved, since when, how strongly; and how its canary does."""
        full = name if name in fleet and caller.operator else owned(name, caller)
        told = await asyncio.to_thread(watcher.report, full)
        return {"object": "adapter.drift", "name": name, "watching": watcher.running, **told}

    @app.post("/v1/adapters/{name:path}/drift/acknowledge")
    async def acknowledge(name: str, body: Acknowledged, request: Request, caller: Manager) -> dict[str, Any]:
        """Its alarms have been dealt with: evidence begins again at nothing."""
        request.state.subject = f"{spelled(name, caller.tenant)}@v{body.version}"
        full = owned(name, caller)
        registry.get(full, body.version)
        await asyncio.to_thread(watcher.acknowledge, full, f"v{body.version}")
        return {"object": "adapter.drift", "name": name, **await asyncio.to_thread(watcher.report, full)}

    @app.post("/v1/adapters/{name:path}/baseline")
    async def baseline(name: str, body: Rehearsed, request: Request, caller: Manager) -> dict[str, Any]:
        """A version's baseline, of what it answers to these prompts; it takes as long as the answers do."""
        request.state.subject = f"{spelled(name, caller.tenant)}@v{body.version or '(live)'}"
        which = baselined(owned(name, caller), body.version)
        exchanges = await rehearsal.run(which, body.prompts, max_tokens=body.max_tokens)
        label = f"v{which.version}"
        rows = await asyncio.to_thread(_asked, watcher.adopt, which.name, label, which.id, exchanges)
        return {"object": "baseline", "name": name, "version": which.version, "requests": rows}

    @app.get("/v1/adapters/{name:path}/baseline")
    async def saved_baseline(name: str, caller: Manager, version: PositiveInt | None = None) -> Response:
        """A version's baseline, to ship with the adapter."""
        which = baselined(owned(name, caller), version)
        data = await asyncio.to_thread(_asked, watcher.packed, which.name, f"v{which.version}", which.id)
        return Response(data, media_type="application/zip")

    @app.put("/v1/adapters/{name:path}/baseline")
    async def shipped_baseline(
        name: str, request: Request, caller: Manager, version: PositiveInt | None = None
    ) -> dict[str, Any]:
        """The baseline that came with the adapter."""
        request.state.subject = f"{spelled(name, caller.tenant)}@v{version or '(live)'}"
        which = baselined(owned(name, caller), version)
        data = b""
        async for chunk in request.stream():
            data += chunk
            if len(data) > MAX_BASELINE:
                raise TooLarge(f"a baseline is at most {MAX_BASELINE >> 20} MiB")
        label = f"v{which.version}"
        rows = await asyncio.to_thread(_asked, watcher.unpack, which.name, label, which.id, data)
        return {"object": "baseline", "name": name, "version": which.version, "requests": rows}

    @app.post("/v1/feedback")
    async def rate(body: Rating, request: Request, caller: Asker) -> dict[str, Any]:
        """A rating of an answer, by its id."""
        request.state.unaudited = True
        answered, rating = feedback.join(caller.tenant, body.request_id, body.rating, body.answer)
        monitor.rated(answered.adapter, answered.version, "good" if rating >= GOOD else "bad")
        if answered.dealt:
            watcher.rated(answered.adapter, answered.version, rating, answered.asker)
        return {"object": "feedback", "request_id": body.request_id, "rating": rating}

    @app.get("/v1/adapters/{name:path}")
    async def adapter(name: str, caller: Manager, response: Response) -> dict[str, Any]:
        full = owned(name, caller)
        told = summary(full, caller)
        # For a change's If-Match; of no use to a cache, since more changes here than what is live.
        response.headers.update({"etag": f'"{told["live"] or 0}"', "cache-control": "no-store"})
        for version in told["versions"]:
            version["recent"] = recent.described(full, f"v{version['version']}")
        return {**told, "history": registry.history(full)}

    @app.post("/v1/adapters/{name:path}/promote")
    async def promote(
        name: str, body: Promote, request: Request, caller: Manager, matching: Expected
    ) -> dict[str, Any]:
        request.state.subject = f"{spelled(name, caller.tenant)}@v{body.version}"
        full, expected = owned(name, caller), _agreed(body.expected_version, matching)
        referee.check(full, body.version, body.at_once)
        weight, canary, live = referee.policy(full).canary_weight, registry.canary(full), _live_version(registry, full)
        known = live in (None, body.version) or (canary is not None and canary.adapter.version == body.version)
        if weight > 0 and not body.at_once and not known:
            await lifecycle.share(full, "canary", body.version, weight, by=caller.name, why=body.why, expected=expected)
            return described(registry.get(full, body.version), caller)
        done = await lifecycle.promote(full, body.version, by=caller.name, expected=expected, why=body.why)
        monitor.swapped(full, "promoted")
        return described(done, caller)

    @app.post("/v1/adapters/{name:path}/rollback")
    async def rollback(
        name: str, request: Request, caller: Manager, matching: Expected, body: Rollback | None = None
    ) -> dict[str, Any]:
        body = body or Rollback()
        expected = _agreed(body.expected_version, matching)
        request.state.subject = spelled(name, caller.tenant)
        full = owned(name, caller)
        done = await lifecycle.rollback(full, by=caller.name, expected=expected, why=body.why)
        request.state.subject = done.tag
        monitor.swapped(full, "rolled_back")
        return described(done, caller)

    @app.post("/v1/adapters/{name:path}/canary")
    async def canary(name: str, body: Weight, request: Request, caller: Manager, expected: Expected) -> dict[str, Any]:
        request.state.subject = f"{spelled(name, caller.tenant)}@v{body.version}"
        full = owned(name, caller)
        await lifecycle.share(
            full, "canary", body.version, body.weight, by=caller.name, why=body.why, expected=expected
        )
        return summary(full, caller)

    @app.post("/v1/adapters/{name:path}/shadow")
    async def shadow(name: str, body: Weight, request: Request, caller: Manager, expected: Expected) -> dict[str, Any]:
        request.state.subject = f"{spelled(name, caller.tenant)}@v{body.version}"
        full = owned(name, caller)
        await lifecycle.share(
            full, "shadow", body.version, body.weight, by=caller.name, why=body.why, expected=expected
        )
        return summary(full, caller)

    @app.post("/v1/adapters/{name:path}/visibility")
    async def visibility(
        name: str, body: Visibility, request: Request, caller: Manager, expected: Expected
    ) -> dict[str, Any]:
        request.state.subject = spelled(name, caller.tenant)
        full = owned(name, caller)
        shared = body.visibility == "shared"
        await lifecycle.publish(full, shared, by=caller.name, why=body.why, expected=expected)
        return summary(full, caller)

    @app.post("/v1/adapters/{name:path}/pin")
    async def pin(
        name: str, request: Request, caller: Manager, expected: Expected, body: Pin | None = None
    ) -> dict[str, Any]:
        body = body or Pin()
        request.state.subject = spelled(name, caller.tenant) + (f"@v{body.version}" if body.version else "")
        full = owned(name, caller)
        await lifecycle.pin(full, body.version, by=caller.name, why=body.why, expected=expected)
        return summary(full, caller)

    @app.delete("/v1/adapters/{name:path}/pin")
    async def unpin(name: str, request: Request, caller: Manager, expected: Expected) -> dict[str, Any]:
        request.state.subject = spelled(name, caller.tenant)
        full = owned(name, caller)
        await lifecycle.unpin(full, by=caller.name, expected=expected)
        return summary(full, caller)

    @app.delete("/v1/adapters/{name:path}/versions/{number}")
    async def remove_version(
        name: str,
        number: int,
        request: Request,
        caller: Manager,
        expected: Expected,
        force: bool = False,
        why: str = "",
    ) -> dict[str, Any]:
        request.state.subject = f"{spelled(name, caller.tenant)}@v{number}"
        gone = await lifecycle.remove(
            owned(name, caller), number, by=caller.name, force=force, expected=expected, why=why
        )
        await asyncio.to_thread(_forget, watcher, gone)
        return {"name": name, "deleted": [one.version for one in gone]}

    @app.delete("/v1/adapters/{name:path}")
    async def remove(name: str, request: Request, caller: Manager, expected: Expected, why: str = "") -> dict[str, Any]:
        request.state.subject = spelled(name, caller.tenant)
        gone = await lifecycle.remove(owned(name, caller), by=caller.name, expected=expected, why=why)
        await asyncio.to_thread(_forget, watcher, gone)
        return {"name": name, "deleted": [one.version for one in gone]}

    @app.post("/v1/alerts")
    async def alerts(body: Notification, request: Request, caller: Manager) -> dict[str, Any]:
        """Alertmanager's webhook."""
        if not ready.is_set():
            raise fleet.first.unavailable()
        rows = [
            await alerting.take(alert, may=manages(caller, alert.labels.get("adapter", "")), by=caller.name)
            for alert in body.alerts
        ]
        request.state.subject = ", ".join(f"{row['alert']}: {row['outcome']}" for row in rows)
        return {"object": "list", "data": rows}

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
    app.state.watcher, app.state.prober, app.state.inference = watcher, prober, inference
    app.state.wayback, app.state.monitor, app.state.lifecycle = wayback, monitor, lifecycle
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


def _stated(request: Request) -> int:
    """How many bytes the client says are coming; 0 if it does not."""
    stated = request.headers.get("content-length", "")
    return int(stated) if stated.isascii() and stated.isdigit() and len(stated) < 20 else 0


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
    return Fetch(
        name=form["name"],
        source="",
        promote=promote == "true",
        visibility=visibility,  # type: ignore[arg-type]
        engine=form.get("engine"),
        why=form.get("why", ""),
    )


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
    came = await asyncio.to_thread(
        fetch,
        source,
        folder,
        max_bytes=config.max_upload_bytes,
        card=bool(config.allowed_licenses),
        anonymous=not trusted,
    )
    commit = f" (commit {came.commit})" if came.commit else ""
    return asked.model_copy(update={"why": asked.why or f"from {asked.source}{commit}"})


def _learn(watcher: Watcher, learned: dict[str, str], base: str, model: str) -> None:
    """Have the versions over this model watched; without its embedding table there is nothing to watch with."""
    if learned.get(base) == model:
        return
    watcher.pause(base)
    learned[base] = model
    try:
        embedding = Embedding.of(Path(model))
    except LoradockError as error:
        log.warning("drift is not watched for %s: %s", base, error)
        return
    tokenizer = Path(model) / "tokenizer.json"
    watcher.learn(base, embedding, _digest(tokenizer) if tokenizer.exists() else "")


def live_expected(header: str | None) -> int | None:
    """The version that an If-Match names, as this server's ETags do; 0 for none; None if it leaves that open."""
    if header is None or header.strip() == "*":
        return None
    number = header.strip().strip('"').removeprefix("v")
    if not number.isascii() or not number.isdigit() or len(number) > 9:
        raise BadRequest(
            f'If-Match takes the version that is live now, for instance "3", or "0" for none; not {shown(header)}',
            param="if-match",
        )
    return int(number)


def _agreed(asked: int | None, matching: int | None) -> int | None:
    """What the body expects to be live, or the header."""
    if None not in (asked, matching) and asked != matching:
        raise BadRequest(f"expected_version is {asked} and If-Match {matching}: send one", param="expected_version")
    return matching if asked is None else asked


def _asked(do: Callable[..., Any], *args: Any) -> Any:
    """What a baseline's own error says is, here, about the request."""
    try:
        return do(*args)
    except ConfigError as error:
        raise BadRequest(error.message) from error


def _forget(watcher: Watcher, gone: Sequence[Adapter]) -> None:
    for adapter in gone:
        watcher.forget(adapter.name, adapter.id)


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _live_version(registry: Registry, full: str) -> int | None:
    live = registry.live(full) if full in registry else None
    return live.version if live else None


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
                    "parent": registry.base(full) or fleet.first.name,
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
