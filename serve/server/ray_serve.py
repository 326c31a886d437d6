"""N servers behind one address, on one machine or many: Ray Serve runs replicas of the same app, each with its engine.

They share a registry and the adapters' bytes, so that a change on one holds on all (serve.rollout.registry_sync). Ray
restarts what dies, routes to whoever has least to do, or with `fleet: homes` to a home of the adapter
(serve.server.ray_router), and adds replicas while requests wait or their first token comes late.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import secrets
import signal
import statistics
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.asgi.exchange import Exchange
from serve.config import Base, Config, load
from serve.dataset.capture import Capture
from serve.dataset.conversations import Conversations
from serve.engine.backend import Backend
from serve.engine.engine import Phase
from serve.errors import ConfigError, EngineUnavailable, LoradockError
from serve.models import hardware
from serve.server import gpu_defaults
from serve.server.connection import KEEP_ALIVE
from serve.server.launch import Server, own, resolved
from serve.server.logs import log_to_stderr
from serve.server.ray_proxy import CALLBACK, IMPORT_PATH
from serve.vllm_backend import forkserver

log = logging.getLogger("loradock")

NAME = "loradock"
# Over how many seconds the times to first tokens are averaged.
LOOK_BACK_SECONDS = 30.0
# Each replica's own admission says who waits and who is turned away.
AT_ONCE = 10_000
MAX_REPLICAS_A_NODE = 64
# Ray's store of shared objects, which nothing here uses, takes a third of the memory unless told otherwise.
OBJECT_STORE_BYTES = 128 << 20
# What Ray sets for each of its processes, and would bind an engine to one thread.
OMP = "OMP_NUM_THREADS"
# Ray would let an engine run at niceness 15, behind everything else on its machine.
SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_COLOR_PREFIX": "0", "RAY_worker_niceness": "0"}
# Between two looks for folders that nobody serves from.
TAKE_OVER_SECONDS = 600.0
# Of all replicas; Ray rounds it up to one.
SURGE_PERCENT = 1
# Between two times that a replica says what it holds.
STATS_SECONDS = 1.0
LOGGING = {"log_level": "WARNING", "enable_access_log": False}
# What changes how many replicas there are, and nothing that they do.
OF_SIZE = ("replicas", "max_replicas", "target_queue", "target_first_token")
_HANGUP = threading.Event()


class _Stop(Exception):
    """SIGTERM or Ctrl-C."""


def serve(config: Config, reload: Callable[[], Config]) -> int:
    """Serve until SIGTERM; the exit code.

    SIGHUP replaces the replicas one by one, with the settings of that moment. Those that run stay where only their
    number is another.
    """
    log_to_stderr(config.log_level)
    hardware.listen(config.host, config.port).close()
    if config.fleet == "homes":
        # A cluster of our own gets it; one that runs already has to be started with it.
        os.environ.setdefault(CALLBACK, IMPORT_PATH)
    with own(config.data_dir), _joined(config.ray_address or os.environ.get("RAY_ADDRESS", "")) as several:
        try:
            config = shared(config, several=several)
            _start(config)
            _deploy(config, version := secrets.token_hex(8))
            while True:
                log.info("ready: %s:%d/v1 answers as %s", config.host, config.port, config.name)
                _until_hangup()
                try:
                    wanted = shared(reload(), several=several)
                    if only_resized(config, wanted):
                        log.info("replicas come or go, those that run stay: %s", _numbers(wanted))
                    else:
                        log.info("replacing the replicas, one after the other")
                        version = secrets.token_hex(8)
                    _deploy(wanted, version)
                    config = wanted
                except ConfigError as error:
                    log.error("the replicas are not replaced, those from before go on: %s", error)
        except _Stop:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)  # a second one does not wait
            log.info("stopping: running answers may finish")
    return 0


@contextmanager
def _joined(address: str) -> Iterator[bool]:
    """A Ray cluster until the block ends, one of our own without an address; whether it has more nodes than one."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        from ray import serve as ray_serve
    except ImportError as missing:
        raise ConfigError("--ray needs Ray: install loradock[ray] beside the engine's extra") from missing
    alone: dict[str, Any] = {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    try:
        ray.init(address=address or None, namespace=NAME, logging_level=logging.WARNING, **({} if address else alone))
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(f"there is no Ray cluster to join at {address or 'this machine'}: {error}") from error
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.WARNING)

    def stop(*_: object) -> None:
        raise _Stop

    # After ray.init, which has handlers of its own.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    signal.signal(signal.SIGHUP, lambda *_: _HANGUP.set())
    try:
        yield sum(node["Alive"] for node in ray.nodes()) > 1
    finally:
        ray_serve.shutdown()
        ray.shutdown()


def _until_hangup() -> None:
    while not _HANGUP.wait(1.0):  # handlers of signals run between two waits
        continue
    _HANGUP.clear()


def _start(config: Config) -> None:
    """Ray Serve's proxies, one on each node that has a replica."""
    from ray import serve as ray_serve

    ray_serve.start(http_options=_http(config), logging_config=LOGGING)


def shared(config: Config, *, several: bool) -> Config:
    """The same Config with a registry and a place for adapters that every replica sees, and fit to travel.

    On one machine both lie where a server alone has them, so it can take over, and `loradock backup` finds them.
    """
    if several and (not config.registry or config.registry.startswith("sqlite") or not config.blobs):
        raise ConfigError(
            "replicas on several machines need a registry and a place for adapters that all of them reach: set "
            "registry to postgresql+psycopg://user@host/loradock and blobs to s3://bucket/prefix"
        )
    return replace(
        config,
        registry=config.registry or f"sqlite:///{config.data_dir / 'registry.sqlite'}",
        blobs=config.blobs or f"file://{config.data_dir / 'blobs'}",
        # A read-only view of a dictionary cannot be pickled.
        engine=dict(config.engine),
        engines=tuple(Base(base.name, base.model, dict(base.engine)) for base in config.engines),
    )


def only_resized(before: Config, after: Config) -> bool:
    """Whether nothing but how many replicas there are to be differs."""
    return before != after and replace(before, **{name: getattr(after, name) for name in OF_SIZE}) == after


def _numbers(config: Config) -> str:
    least, most = config.replicas, config.max_replicas
    return str(least) if most <= least else f"{least} to {most}"


def _deploy(config: Config, version: str) -> None:
    """Start the replicas, or replace one by one those of another version: those that answer stay until others do."""
    from ray import serve as ray_serve

    try:
        ray_serve.run(_application(config, version), name=NAME, route_prefix="/")
    except RuntimeError as error:
        raise ConfigError(f"the replicas do not start, their log above says why: {error}") from error


def application(settings: Mapping[str, Any]) -> Any:
    """For a configuration file of Ray Serve's, as KubeRay's RayService has one: `import_path` names this function.

    `settings` are its `args`: settings by name, before those of LORADOCK_* variables. Where it listens, Ray Serve's
    own `http_options` say, so `host` and `port` there must be the same.
    """
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    return _application(shared(load(["--ray", *flags]), several=True))


def _application(config: Config, version: str = "") -> Any:
    from ray import serve as ray_serve

    deployment = ray_serve.deployment(ray_serve.ingress()(Replica))
    fixed = config.max_replicas <= config.replicas
    options: dict[str, Any] = {
        "num_replicas": config.replicas if fixed else None,
        "autoscaling_config": None if fixed else _autoscaling(config),
        "max_ongoing_requests": AT_ONCE,
        "graceful_shutdown_wait_loop_s": 0.5,
        "graceful_shutdown_timeout_s": config.grace_period + 10,
        "logging_config": LOGGING,
        "health_check_period_s": 5,
        "health_check_timeout_s": 60,
        **_place(config),
        **_routing(config),
    }
    options = {name: value for name, value in options.items() if value is not None}
    if _fits_one_more(options):
        # Ray stops a replica before it starts the one in its place, unless it may have one more. Where there is no
        # room for that, the new one would wait for ever.
        options["max_surge_percent"] = SURGE_PERCENT
    if version:
        # By it Ray knows replicas that run already. Without, it makes one up for each deployment.
        options |= {"version": version, "_internal": True}
    return deployment.options(name=NAME, **options).bind(config, os.environ.get(OMP))


def _routing(config: Config) -> dict[str, Any]:
    """With homes, Ray's proxies send a request to one; else to whoever of two has less to do."""
    if config.fleet != "homes":
        return {}
    from ray.serve.config import RequestRouterConfig

    router = "serve.server.ray_router:HomesRouter"
    return {
        "request_router_config": RequestRouterConfig(
            request_router_class=router, request_routing_stats_period_s=STATS_SECONDS
        )
    }


def _fits_one_more(place: Mapping[str, Any]) -> bool:
    """Whether the cluster has room for one replica more than run now, by what it takes of a node."""
    import ray

    if not ray.is_initialized():
        return False
    actor = place.get("ray_actor_options") or {}
    bundles = place.get("placement_group_bundles") or [{"CPU": actor["num_cpus"], "GPU": actor.get("num_gpus", 0)}]
    free = ray.available_resources()
    return all(sum(bundle.get(kind, 0) for bundle in bundles) <= free.get(kind, 0) for kind in ("CPU", "GPU"))


def _place(config: Config) -> dict[str, Any]:
    """What one replica takes of a node: a GPU for each part of the model, or a processor."""
    if hardware.on_cpu():
        return {"ray_actor_options": {"num_cpus": 1}}
    taken = [gpu_defaults.devices(base.engine) for base in config.bases]
    if any(base.engine.get("distributed_executor_backend") == "ray" for base in config.bases):
        if len(taken) > 1:
            raise ConfigError(
                "distributed_executor_backend=ray is for one engine a replica: vLLM's workers of a second one would "
                "wait for the GPUs of the first; serve the other bases from a deployment of their own"
            )
        # vLLM's own workers take the bundles, on one node or on many.
        return {"placement_group_bundles": [{"CPU": 1, "GPU": 1}] * len(taken[0]), "placement_group_strategy": "PACK"}
    # Engines take the first that the replica sees, data-parallel ranks one after the other; several engines share them.
    return {"ray_actor_options": {"num_cpus": 1, "num_gpus": len(set().union(*taken))}}


def _http(config: Config) -> dict[str, Any]:
    options: dict[str, Any] = {"host": config.host, "port": config.port, "keep_alive_timeout_s": KEEP_ALIVE}
    if config.ssl_certfile:
        options |= {"ssl_certfile": config.ssl_certfile, "ssl_keyfile": config.ssl_keyfile}
    return options


def _autoscaling(config: Config) -> dict[str, Any]:
    return {
        "min_replicas": config.replicas,
        "max_replicas": config.max_replicas,
        "look_back_period_s": 10.0,
        "upscale_delay_s": 10.0,
        "downscale_delay_s": 300.0,
        "policy": {"policy_function": by_load(config.target_queue, config.target_first_token)},
    }


def by_load(target_queue: float, target_first_token: float) -> Callable[[Any], tuple[int, dict[str, Any]]]:
    """Ray's autoscaling policy: so many requests a replica, and one replica more while first tokens come late."""

    def policy(context: Any) -> tuple[int, dict[str, Any]]:
        wanted = math.ceil(context.total_num_requests / target_queue)
        late = (context.aggregated_metrics or {}).get("first_token_seconds") or {}
        if target_first_token and late and max(late.values()) > target_first_token:
            wanted = max(wanted, context.current_num_replicas + 1)
        least, most = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
        return min(max(wanted, least), most), {}

    return policy


class Replica:
    """One server of many, in a process that Ray started: the same app as alone, ready before Ray sends it anything."""

    def __init__(self, config: Config, threads: str | None) -> None:
        os.environ.pop(OMP, None)
        if threads:
            os.environ[OMP] = threads
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        log_to_stderr(config.log_level)
        self._held = ExitStack()
        self._config, self._number = self._placed(config)
        self._first_tokens = FirstTokens()
        self._failure: LoradockError | None = None
        self._app: FastAPI | None = None
        # Of this replica's own address, and all that runs beside what Ray sends.
        self._own: Server | None = None
        self._beside: list[asyncio.Future[None]] = []

    def __serve_build_asgi_app__(self) -> ASGIApp:
        config = resolved(self._config)
        if config.fleet == "homes":
            config = replace(config, fleet_address=self._address(config))
        from serve.server.assembly import build_app

        self._app = build_app(
            config,
            self._backends(config),
            self._fail,
            replica=f"{hardware.node()}-{self._number}-{secrets.token_hex(3)}",
            observers=[self._first_tokens.take],
        )
        return Ready(self._app, self._wait, self._leave)

    def _backends(self, config: Config) -> list[Backend]:
        if hardware.on_cpu():
            forkserver.start()
        from serve.vllm_backend.backend import VLLMBackend

        return [VLLMBackend(base.model, base.name, base.engine, config.coalesce_ms) for base in config.bases]

    def check_health(self) -> None:
        """An engine that stays down is Ray's to replace."""
        if self._app is None:
            return
        for base in self._app.state.parts.fleet:
            if base.phase is Phase.FAILED:
                raise EngineUnavailable(f"the engine for {base.name} stays down: {base.reason}")

    def record_autoscaling_stats(self) -> dict[str, float]:
        return {"first_token_seconds": self._first_tokens.mean()}

    async def record_routing_stats(self) -> dict[str, Any]:
        """For Ray's router."""
        membership = self._app.state.parts.membership if self._app else None
        return membership.routing_stats() if membership else {}

    def _fail(self, error: LoradockError) -> None:
        self._failure = error

    async def _wait(self) -> str:
        """Until the engines answer; why they never will, if so."""
        assert self._app is not None
        while not self._app.state.parts.health.ready.is_set():
            if self._failure:
                return str(self._failure)
            await asyncio.sleep(0.1)
        self._beside = [asyncio.ensure_future(work) for work in (self._listen(self._app), self._take_over())]
        return ""

    async def _leave(self) -> None:
        """Take no more at its own address, and finish what came there: Ray, which waits for what it sent, knows nothing
        of that."""
        if self._own is not None:
            self._own.ask_to_stop()
            await asyncio.wait(self._beside[:1])

    async def _take_over(self) -> None:
        """What replicas left behind that are gone for good."""
        while True:
            await asyncio.to_thread(take_over, self._config.data_dir, self._config.capture_hours)
            await asyncio.sleep(TAKE_OVER_SECONDS)

    async def _listen(self, app: FastAPI) -> None:
        """Also answer on a port of this replica's own: what Prometheus reads there is its, and no other's."""
        port = self._config.port + 1 + self._number
        try:
            sock = hardware.listen(self._config.host, port)
        except ConfigError as error:
            log.warning("this replica has no address of its own: %s", error)
            return
        quiet: dict[str, Any] = {"log_level": "warning", "access_log": False, "lifespan": "off"}
        quiet["timeout_graceful_shutdown"] = max(1, round(self._config.grace_period))
        quiet |= {"ssl_certfile": self._config.ssl_certfile or None, "ssl_keyfile": self._config.ssl_keyfile or None}
        self._own = Server(uvicorn.Config(app, **quiet))
        await self._own.serve(sockets=[sock])

    def _address(self, config: Config) -> str:
        """Where other replicas reach this one: its own port."""
        import ray

        scheme = "https" if config.ssl_certfile else "http"
        host = ray.util.get_node_ip_address() if config.host in ("", "0.0.0.0", "::") else config.host
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{config.port + 1 + self._number}"

    def _placed(self, config: Config) -> tuple[Config, int]:
        """A data directory of this replica's own below the common one, the first that nobody has."""
        for number in range(MAX_REPLICAS_A_NODE):
            folder = config.data_dir / f"replica-{number}"
            try:
                self._held.enter_context(own(folder))
            except ConfigError:
                continue
            return replace(config, data_dir=folder), number
        raise ConfigError(f"{MAX_REPLICAS_A_NODE} replicas serve from {config.data_dir}, or it cannot be written")


def take_over(mine: Path, hours: float) -> None:
    """Of folders beside this replica's that nobody serves from: their webhooks are delivered here, and what they
    captured is deleted in time. Blocks."""
    for folder in sorted(mine.parent.glob("replica-*")):
        if folder == mine:
            continue
        try:
            with own(folder):
                (mine / "webhooks").mkdir(mode=0o700, exist_ok=True)
                for event in (folder / "webhooks").glob("[0-9]*.json"):
                    event.rename(mine / "webhooks" / event.name)
                Capture(folder / "captured", str, enabled=False, hours=hours).save()
                conversations = Conversations(folder / "conversations.db", enabled=False, hours=hours)
                conversations.save()
                conversations.stop()
        except ConfigError:
            continue  # a replica has it
        except OSError as error:
            log.warning("%s is not looked after: %s", folder, error)


class FirstTokens:
    """The mean time to the first token of the answers that began lately."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: deque[tuple[float, float]] = deque(maxlen=4096)

    def take(self, exchange: Exchange) -> None:
        if exchange.first is not None and exchange.status == 200:
            self._seen.append((self._clock(), exchange.first))

    def mean(self) -> float:
        """In seconds; 0 without answers."""
        oldest = self._clock() - LOOK_BACK_SECONDS
        while self._seen and self._seen[0][0] < oldest:
            self._seen.popleft()
        return statistics.fmean(first for _, first in self._seen) if self._seen else 0.0


class Ready:
    """An app whose start is over once `wait` says so, with what was wrong or nothing: nobody is sent to it before.

    It is told to stop once `leave` is over.
    """

    def __init__(self, app: ASGIApp, wait: Callable[[], Awaitable[str]], leave: Callable[[], Awaitable[None]]) -> None:
        self._app = app
        self._wait = wait
        self._leave = leave

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await self._app(scope, receive, send)
            return

        async def hold(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete" and (wrong := await self._wait()):
                message = {"type": "lifespan.startup.failed", "message": wrong}
            await send(message)

        async def told() -> Message:
            message = await receive()
            if message["type"] == "lifespan.shutdown":
                await self._leave()
            return message

        await self._app(scope, told, hold)
