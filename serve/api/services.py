"""`Services`: everything that a server is made of, introduced to one another."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import logging
import re
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

from serve import __version__
from serve.adapters.adapter import Limits as AdapterLimits
from serve.adapters.registry import Registry
from serve.adapters.shared_store import SharedStore
from serve.adapters.store import Store
from serve.api.background_tasks import BackgroundTasks
from serve.asgi.exchange_worker import ExchangeWorker
from serve.auth.audit import Audit
from serve.auth.auth import Auth
from serve.auth.keys import Keys
from serve.auth.rate_limits import Meters
from serve.config import Config
from serve.drift.baseline_build import BaselineBuild
from serve.drift.embedding import Embedding
from serve.drift.logprob_sampling import LogprobSampling
from serve.drift.monitor import DriftMonitor
from serve.drift.prober import Prober
from serve.drift.watched_version import DriftSettings
from serve.engine.effect_probe import Probe
from serve.engine.engine import Backend, Engine
from serve.engine.fleet import Fleet
from serve.engine.restarts import Patience
from serve.engine.supervisor import Supervisor
from serve.errors import ConfigError, EngineUnavailable, LoradockError
from serve.gateway.inference import Inference
from serve.gateway.router import Router
from serve.models.checkpoint import takes_media
from serve.models.hardware import node
from serve.rollout.alertmanager import Alerts
from serve.rollout.canary import CanaryVerdict
from serve.rollout.canary_monitor import CanaryMonitor
from serve.rollout.controller import RolloutController
from serve.rollout.lifecycle import Lifecycle
from serve.rollout.policy import ROLLBACK, policy_for
from serve.rollout.prefetch import Prefetcher
from serve.rollout.registry_sync import RegistrySync, Replica
from serve.rollout.rollback import AutomaticRollback
from serve.rollout.shadow import ShadowExchange, Shadows
from serve.rollout.swap_follower import SwapFollower
from serve.telemetry.capture import QUEUE_SIZE as CAPTURE_QUEUE_SIZE
from serve.telemetry.capture import Capture
from serve.telemetry.feedback import Feedback
from serve.telemetry.metrics import Metrics
from serve.telemetry.recent import Recent

log = logging.getLogger(__name__)

LOG_STATS_SECONDS = 10.0


class Services:
    """What `build_app` says of its arguments; `running` is the server's lifetime."""

    def __init__(
        self,
        config: Config,
        backends: Sequence[Backend],
        on_failure: Callable[[LoradockError], None] | None = None,
        on_shadow: Callable[[ShadowExchange], None] | None = None,
        replica: str = "",
    ) -> None:
        self.config = config
        self.ready = asyncio.Event()
        self._on_failure = on_failure or log.error
        self._learned: dict[str, str] = {}
        self._learning: list[asyncio.Task[None]] = []
        self._loop: asyncio.AbstractEventLoop | None = None

        self.store = Store(config.data_dir, shared=SharedStore(config.blobs) if config.blobs else None)
        self.registry = Registry(config.registry_url, standing=config.data_dir / "rollbacks.json")
        patience = Patience(**{one.name: getattr(config, one.name) for one in dataclasses.fields(Patience)})
        self.fleet = Fleet(
            [Supervisor(one, self._probe, patience, tolerance=config.swap_tolerance) for one in backends],
            self.registry.base,
        )
        self.lifecycle = Lifecycle(self.fleet, self.registry, self.store, lambda base: _limits(config, base.backend))
        self._prefetcher = Prefetcher(
            self.fleet, self.lifecycle, self.lifecycle.popularity, config.data_dir / "popular.json"
        )
        for one in self.fleet:
            one.on_serve = partial(self._served, one)
        self.lifecycle.meet = self._meet
        self.keys = Keys(self.registry)
        # A registry that has a URL of its own may have other servers too.
        me = Replica(replica or f"{node()}-{secrets.token_hex(4)}", node())
        self.follower = (
            RegistrySync(self.registry, self.keys, self.lifecycle, self.fleet, me) if config.registry else None
        )
        self.auth = Auth(config.api_keys, config.admin_keys, self.keys.caller, lambda: self.keys.any)
        self.audit = Audit(config.data_dir / "audit.jsonl")
        self._introduce_those_who_watch()
        self.background = BackgroundTasks()
        self.monitor.watch(self.background)
        self._swap_follower = SwapFollower(self.registry, self.fleet) if self.follower else None
        self.recent = Recent()
        self.monitor.passed_on.append(self.recent.take)
        self.baseline_build = BaselineBuild(self.fleet, self.store)
        shadows = Shadows(self.fleet, self.store, self.monitor.shadowed, on_shadow, limit=config.max_shadows)
        self._shadows = shadows
        self.meters = Meters()
        router = Router(self.fleet, self.registry, self.store, self.lifecycle.popularity.used)
        self.inference = Inference(
            self.auth,
            router,
            self.meters,
            self.monitor.take,
            shadows,
            self.wants_logprobs,
            config.client_timeout,
            self.follower.fresh if self.follower else None,
            media=any(takes_media(base.model) for base in config.bases),
        )

    def _introduce_those_who_watch(self) -> None:
        """Whoever hears of an answer after it was given, and what follows from it."""
        config, fleet, registry = self.config, self.fleet, self.registry
        self.monitor = Metrics(
            fleet, registry, self.audit, __version__, config.slos, limit=config.max_labelled_versions
        )
        self.automatic_rollback = AutomaticRollback(self.lifecycle, registry, self.audit, self.monitor.rolled_back)
        self.alerting = Alerts(
            self.automatic_rollback,
            registry,
            lambda adapter: policy_for(config.policies, adapter).worse == ROLLBACK,
        )
        self.feedback = Feedback()
        self.canary_monitor = CanaryMonitor(
            config.data_dir / "drift",
            share=lambda adapter: registry.canary(adapter) if adapter in registry else None,
            live=self.live_version,
            alpha=lambda adapter: policy_for(config.policies, adapter).alpha,
            on_verdict=self._act_on,
            label=self.monitor.label,
        )
        self.rollout_controller = RolloutController(
            self.automatic_rollback,
            self.lifecycle,
            registry,
            self.audit,
            self.canary_monitor,
            config.policies,
            self.monitor.swapped,
        )
        self.drift_monitor = DriftMonitor(
            config.data_dir / "drift",
            _drift_settings(config),
            base_of=lambda adapter: adapter if adapter in fleet else fleet.of(adapter).name,
            on_alarm=self.rollout_controller.alarmed,
            label=self.monitor.label,
        )
        self.exchange_worker = ExchangeWorker([self.canary_monitor, self.drift_monitor])
        self._logprob_sampling = LogprobSampling(config.drift_logprobs)
        for collector in (self.drift_monitor, self.canary_monitor, self.rollout_controller, self.exchange_worker):
            self.monitor.watch(collector)
        self.monitor.passed_on += [self.feedback.remember, self.exchange_worker.offer]
        capture = Capture(
            config.data_dir / "captured",
            lambda adapter: (fleet.get(adapter) if adapter in fleet else fleet.of(adapter)).model,
            enabled=config.capture_text,
            redact=config.capture_redact,
            hours=config.capture_hours,
        )
        self._capture_worker = ExchangeWorker([capture], name="capture", queue_size=CAPTURE_QUEUE_SIZE)
        if config.capture_text:
            self.monitor.passed_on.append(self._capture_worker.offer)
        self.prober = Prober(
            fleet,
            registry,
            self.store,
            self.drift_monitor,
            self.rollout_controller.alarmed,
            interval=config.drift_probe_interval,
        )

    def wants_logprobs(self, adapter: str) -> bool:
        """Whether a request to this adapter is answered with log-probabilities, unseen by the client.

        Decided before anybody knows which version answers, so that both sides of a canary are sampled alike.
        """
        if not self.exchange_worker.running:
            return False
        sampled = self._logprob_sampling.sampled()
        return sampled or self.canary_monitor.wants_logprobs(adapter)

    def live_version(self, full: str) -> int | None:
        """The number of the version of this adapter that is live, if there is such an adapter and version."""
        live = self.registry.live(full) if full in self.registry else None
        return live.version if live else None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        self._loop = asyncio.get_running_loop()
        starting = asyncio.create_task(self._bring_up())
        self.background.start("log_stats", self._log_stats)
        self.background.start("write_down_rollbacks", self.lifecycle.write_down)
        self.background.start("prefetch", self._prefetcher.run)
        if self.follower and self._swap_follower:
            self.background.start("registry_poll", self.follower.poll)
            self.background.start("registry_heartbeat", self.follower.heartbeat)
            self.background.start("swap_follower", self._swap_follower.run)
        # It deletes old files also where nothing is captured any more.
        await asyncio.to_thread(self._capture_worker.start)
        try:
            yield
        finally:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            await self.background.stop()
            if self.follower:
                await self.follower.close()
            await asyncio.to_thread(self.exchange_worker.stop)
            await self.rollout_controller.close()
            await asyncio.to_thread(self._capture_worker.stop)
            await self._shadows.close()
            await self._prefetcher.save()
            await self.lifecycle.settle()
            await self.fleet.stop()
            self.registry.close()

    async def _bring_up(self) -> None:
        """Start the engines; `on_failure` gets the error if one cannot."""
        try:
            await self.lifecycle.sweep()
            await self._prefetcher.load()
            await self.fleet.start(self.lifecycle)
        except LoradockError as error:
            self._on_failure(error)
            return
        except Exception as error:
            log.exception("the server cannot start")
            self._on_failure(ConfigError(f"the server cannot start ({type(error).__name__}: {error}): see the log"))
            return
        self.ready.set()
        self.background.start("prober", self.prober.run)

    @property
    def degraded(self) -> dict[str, str]:
        """What does not work, though requests are answered, by name."""
        problems = self.background.problems
        if self.registry.standing:
            problems["rollback"] = "a rollback holds on this server and waits for the registry"
        if self.follower and self.follower.problem:
            problems["registry"] = self.follower.problem
        if self._swap_follower and self._swap_follower.problem:
            problems["base_swap"] = self._swap_follower.problem
        return problems

    async def _log_stats(self) -> None:
        while True:
            await asyncio.sleep(LOG_STATS_SECONDS)
            for base in self.fleet:
                with suppress(EngineUnavailable):
                    await base.backend.log_stats()

    def _probe(self, engine: Engine) -> Probe | None:
        if not self.config.probe:
            return None
        return Probe(engine, min_effect=self.config.probe_min_effect, max_perplexity=self.config.probe_max_perplexity)

    async def _meet(self, base: Supervisor, engine: Engine) -> None:
        engine.on_load = self.monitor.loaded
        # While another engine serves, this one is on trial for its place, and the traffic is the other's.
        if self.config.drift and not base.is_ready:
            await asyncio.to_thread(self._learn, base.name, engine.backend.model)

    def _served(self, base: Supervisor, engine: Engine) -> None:
        if self.config.drift and self._learned.get(base.name) != engine.backend.model:
            learning = asyncio.to_thread(self._learn, base.name, engine.backend.model)
            self._learning.append(asyncio.create_task(learning))

    def _learn(self, base: str, model: str) -> None:
        """Have the versions over this model watched; without its embedding table there is nothing to watch with."""
        if self._learned.get(base) == model:
            return
        self.drift_monitor.pause(base)
        self._learned[base] = model
        try:
            embedding = Embedding.of(Path(model))
        except LoradockError as error:
            log.warning("drift is not watched for %s: %s", base, error)
            return
        tokenizer = Path(model) / "tokenizer.json"
        digest = hashlib.sha256(tokenizer.read_bytes()).hexdigest() if tokenizer.exists() else ""
        self.drift_monitor.learn(base, embedding, digest)
        self.exchange_worker.start()

    def _act_on(self, verdict: CanaryVerdict) -> None:
        """Called in the exchange worker's thread."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self.rollout_controller.act_on, verdict)


def _drift_settings(config: Config) -> DriftSettings:
    return DriftSettings(
        threshold=config.drift_threshold,
        reference=config.drift_reference,
        interval=config.drift_interval,
        versions=config.drift_versions,
        capture=config.capture,
        redact=tuple(re.compile(pattern) for pattern in config.capture_redact),
        quote_seconds=config.capture_hours * 3600,
    )


def _limits(config: Config, backend: Backend) -> AdapterLimits:
    """What an upload may be, here."""
    rank = backend.max_lora_rank
    return AdapterLimits(
        max_rank=min(rank, config.max_adapter_rank or rank),
        allowed_target_modules=frozenset(config.allowed_target_modules) or None,
        allowed_licenses=frozenset(one.lower() for one in config.allowed_licenses) or None,
        allowed_digests=frozenset(config.allowed_digests) or None,
    )
