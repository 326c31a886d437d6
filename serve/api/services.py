"""`Services`: all parts of a server, each constructed with those that it works with, in one place."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial

from serve.adapters.byte_ledger import Kind
from serve.adapters.registry.registry import Registry
from serve.adapters.shared_store import SharedStore
from serve.adapters.store import Store
from serve.api.background_tasks import BackgroundTasks
from serve.api.captures import Captures
from serve.api.on_behalf import fine_tuning, loops, meter_of, on_behalf
from serve.api.part_settings import (
    bound_tenants,
    drift_settings,
    rotate_history,
    supervisors,
    tokens_of,
    tracing,
    upload_limits,
)
from serve.asgi.exchange import Exchange
from serve.asgi.exchange_worker import DroppedExchanges, ExchangeWorker
from serve.auth.audit import Audit
from serve.auth.auth import Auth, Caller
from serve.auth.keys import Keys
from serve.auth.rate_limits import Meters
from serve.config import Config
from serve.dataset.feedback import Feedback
from serve.drift.baseline_build import BaselineBuild
from serve.drift.data_quality import DataQuality
from serve.drift.features.logprob_sampling import LogprobSampling
from serve.drift.monitor import DriftMonitor
from serve.drift.prober import Prober
from serve.drift.watched_bases import WatchedBases
from serve.engine.backend import Backend
from serve.engine.fleet import Fleet
from serve.engine.payer import Work
from serve.engine.supervisor import Supervisor
from serve.errors import ConfigError, EngineUnavailable, LoradockError
from serve.events import (
    BaseSwapped,
    CanaryVerdict,
    DriftAlarm,
    Events,
    GoldenScored,
    JobEnded,
    Notice,
    Promoted,
    PromotionHeld,
    Recorded,
    RollbackAttempted,
    RolledBack,
    Unloaded,
    VersionAdded,
)
from serve.gateway.fan_out import RequestBounds
from serve.gateway.inference import Inference
from serve.gateway.router import Router
from serve.loop.loop_rows import LoopRows
from serve.loop.tries import LoopTries
from serve.models.checkpoint import takes_media
from serve.models.hardware import node, on_cpu
from serve.models.language import language_of
from serve.rollout.admit import VersionAdmission
from serve.rollout.alertmanager import Alerts
from serve.rollout.canary.canary_monitor import CanaryMonitor
from serve.rollout.canary.shadow import ShadowExchange, Shadows
from serve.rollout.canary.shadow_agreement import ShadowAgreement
from serve.rollout.controller import RolloutController
from serve.rollout.golden.golden import Golden
from serve.rollout.golden.golden_falls import GoldenFalls
from serve.rollout.golden.golden_results import GoldenResults
from serve.rollout.golden.golden_runner import GoldenRunner
from serve.rollout.golden.golden_schedule import GoldenRuns
from serve.rollout.golden.golden_store import GoldenStore
from serve.rollout.golden.golden_verdicts import GoldenVerdicts
from serve.rollout.golden.held_promotions import HeldPromotions
from serve.rollout.lifecycle import Lifecycle
from serve.rollout.policy import Policies
from serve.rollout.prefetch import Popularity, Prefetcher
from serve.rollout.registry_sync import RegistrySync, Replica
from serve.rollout.rollback import AutomaticRollback
from serve.rollout.swap_follower import SwapFollower
from serve.rollout.webhook import Webhooks
from serve.telemetry.live_state import Objectives
from serve.telemetry.metrics import Metrics
from serve.telemetry.observers import ExchangeObservers
from serve.telemetry.recent import Recent
from serve.telemetry.series import AdapterLoads
from serve.telemetry.usage.usage_ledger import Usage, UsageLedger
from serve.telemetry.usage.usage_metrics import EngineBusy, UsageMetrics

log = logging.getLogger(__name__)

LOG_STATS_SECONDS = 10.0


class Services:
    """What `build_app` says of its arguments; each part is built once those are there that it needs.

    `running` is the server's lifetime.
    """

    def __init__(  # long: one list, in the order in which the parts need one another
        self,
        config: Config,
        backends: Sequence[Backend],
        on_failure: Callable[[LoradockError], None] | None = None,
        on_shadow: Callable[[ShadowExchange], None] | None = None,
        replica: str = "",
        observers: Sequence[Callable[[Exchange], None]] = (),
    ) -> None:
        self.config = config
        self.ready = asyncio.Event()
        self.background = BackgroundTasks()
        self._on_failure = on_failure or log.error

        # What is kept on disk, and who may ask for it
        self.store = Store(config.data_dir, shared=SharedStore(config.blobs) if config.blobs else None)
        self.registry = Registry(config.registry_url, standing=config.data_dir / "rollbacks.json")
        bound_tenants(self.store.ledger, self.registry, config)
        self.keys = Keys(self.registry)
        issued, locked = self.keys.caller, lambda: self.keys.any
        self.tokens = tokens_of(config, self.registry)
        self.auth = Auth(
            config.api_keys, config.admin_keys, issued, locked, config.metrics_keys, self.keys.holder, self.tokens
        )
        self.audit = Audit(config.data_dir / "audit.jsonl", max_bytes=config.audit_bytes, days=config.audit_days)

        # What answers
        self.events, self.policies = Events(), Policies(config.policies)
        loads, popularity = AdapterLoads(), Popularity()
        self.meters = Meters()
        self.usage_ledger = UsageLedger(self.registry, keep_days=config.usage_days)
        self._usage_metrics = UsageMetrics(config.currency, self._exists, limit=config.max_labelled_versions)
        self.fleet = Fleet(supervisors(config, backends, loads, self._count_usage), self.registry.base)
        self.lifecycle = Lifecycle(
            self.fleet,
            self.registry,
            self.store,
            lambda base: upload_limits(config, base.backend),
            popularity,
            self.events,
        )
        self._prefetcher = Prefetcher(self.fleet, self.lifecycle, popularity, config.data_dir / "popular.json")

        # A registry that has a URL of its own may have other servers too
        me = Replica(replica or f"{node()}-{secrets.token_hex(4)}", node())
        sync = RegistrySync(self.registry, self.keys, self.lifecycle, self.fleet, me)
        self.follower = sync if config.registry else None
        self._swap_follower = SwapFollower(self.registry, self.fleet)

        # What looks at answers, and what follows from it
        self.recent, self.feedback = Recent(), Feedback()
        self.metrics = Metrics(
            self.fleet,
            self.registry,
            self.audit,
            loads,
            limit=config.max_labelled_versions,
            more=self._usage_metrics.families,
        )
        self._webhooks = Webhooks(
            config.data_dir / "webhooks", config.webhooks, config.webhook_secret, private=config.webhook_private
        )
        self.tracing = tracing(config, me.id, self.metrics.label)
        self.automatic_rollback = AutomaticRollback(self.lifecycle, self.registry, self.events)
        self.alerting = Alerts(self.automatic_rollback, self.registry, self.policies)
        self._router = Router(self.fleet, self.registry, self.store, popularity.used)
        golden_store = GoldenStore(self.registry, me=me.id)
        results = GoldenResults(golden_store, self.registry, self.metrics.label)
        verdicts = GoldenVerdicts(golden_store, results, self.registry, self.policies, self.events)
        loop_rows = LoopRows(self.registry, me=me.id)
        self.tries = LoopTries(loop_rows, self.follower)
        self.canary_monitor = CanaryMonitor(
            config.data_dir / "drift",
            self.registry,
            self.policies,
            verdicts,
            self.tries,
            self.events,
            label=self.metrics.label,
        )
        self.admission = VersionAdmission(self.lifecycle, self.registry, verdicts, self.canary_monitor, self.policies)
        runner = GoldenRunner(
            self.fleet,
            self.store,
            lambda model, tenant: self._router.resolve(model, Caller("golden", frozenset(), tenant)),
        )
        runs = GoldenRuns(
            results,
            runner,
            verdicts,
            GoldenFalls(golden_store, results, self.registry, self.events),
            HeldPromotions(golden_store, results, self.registry, self.policies, self.admission),
            self.events,
            interval=config.golden_interval,
            meter_of=partial(meter_of, self.auth, self.meters),
        )
        self.golden = Golden(golden_store, results, verdicts, runner, runs)
        self.rollout_controller = RolloutController(
            self.automatic_rollback,
            self.lifecycle,
            self.registry,
            self.canary_monitor,
            verdicts,
            self.tries,
            self.policies,
            self.events,
        )
        self.drift_monitor = DriftMonitor(
            config.data_dir / "drift",
            drift_settings(config),
            base_of=lambda adapter: _base_of(self.fleet, adapter).name,
            events=self.events,
            label=self.metrics.label,
            exists=lambda adapter, id: _exists(self.fleet, self.registry, adapter, id),
            policies=self.policies,
        )
        self.store.ledger.counts(Kind.BASELINES, self.drift_monitor.kept)
        self._data_quality = DataQuality(
            language_of,
            lambda adapter: _context_of(_base_of(self.fleet, adapter)) if self._exists(adapter) else 0,
            self._exists,
            kinds=config.personal_data,
            limit=config.max_labelled_versions,
        )
        # Beside the watcher: it looks at every request, of models too that are not watched for drift.
        self.quality_worker = ExchangeWorker([self._data_quality], name="data-quality")
        self.exchange_worker = ExchangeWorker([self.canary_monitor, self.drift_monitor])
        kept = config.cache_dir / "embeddings"
        self._watched_bases = WatchedBases(self.fleet, self.drift_monitor, self.exchange_worker, kept)
        self._logprob_sampling = LogprobSampling(config.drift_logprobs, by_request=not on_cpu())
        self.prober = Prober(
            self.fleet, self.registry, self.store, self.drift_monitor, self.events, interval=config.drift_probe_interval
        )
        self.captures = Captures(
            config,
            self.fleet,
            self.registry,
            self.store.ledger,
            self.golden,
            self.policies,
            lambda adapter: _base_of(self.fleet, adapter).model,
        )
        self.baseline_build = BaselineBuild(self.fleet, self.store)
        self.shadow_agreement = ShadowAgreement(self.metrics.label)
        for collector in (
            Objectives(config.slos),
            self.events,
            self.drift_monitor,
            self.canary_monitor,
            self.rollout_controller,
            self.golden.results,
            self.shadow_agreement,
            self.exchange_worker,
            self.background,
            self._webhooks,
            self._data_quality,
            EngineBusy(self.fleet),
            DroppedExchanges(capture=self.captures.worker, data_quality=self.quality_worker),
            *([self.tracing] if self.tracing else []),
        ):
            self.metrics.watch(collector)

        # What clients ask
        looks: list[Callable[[Exchange], None]] = [
            self.metrics.take,
            self.feedback.remember,
            self.exchange_worker.offer,
        ]
        looks += [self.quality_worker.offer] if config.data_quality else []
        looks += self.captures.takes
        looks += [self.recent.take, *([self.tracing.take] if self.tracing else [])]
        exchanges = ExchangeObservers([*looks, *observers], self.metrics.tap_took)
        self._shadows = Shadows(
            self.fleet,
            self.store,
            self.metrics.shadowed,
            on_shadow,
            limit=config.max_shadows,
            agreement=self.shadow_agreement,
            grade=self.golden.grade_shadow,
            tracer=self.tracing,
        )
        self.batches, self.moderator, self._guards = on_behalf(self, self._router, me.id)
        self.fine_tuning = fine_tuning(self, self._router, self.batches, me.id)
        self.loops = loops(self, self.fine_tuning, self.batches, self.captures.datasets, loop_rows)
        self._subscribe()
        self.inference = Inference(
            self.auth,
            self._router,
            self.meters,
            exchanges.take,
            self._shadows,
            self.wants_logprobs,
            config.client_timeout,
            self.follower.fresh if self.follower else None,
            media=any(takes_media(base.model) for base in config.bases),
            bounds=RequestBounds(config.max_sequences, config.max_prompt_logprobs, config.max_batch),
            doubted=self.doubted,
            guards=self._guards,
            traced=self.tracing.begin if self.tracing else None,
        )

    def _subscribe(self) -> None:
        """Who is told of what happens: a line each."""
        events, runs = self.events, self.golden.runs
        events.at_once("metrics", self.metrics.count, Promoted, RolledBack, Unloaded, RollbackAttempted)
        events.at_once("golden", lambda event: runs.wake(), VersionAdded, PromotionHeld, BaseSwapped)
        events.at_once("canaries", self.rollout_controller.hear, CanaryVerdict)
        events.subscribe("audit", self.audit.record, Recorded)
        events.subscribe("history", self.rollout_controller.note_alarm, DriftAlarm)
        events.subscribe("webhooks", self._webhooks.tell, Notice)
        if self.tracing:
            events.subscribe("tracing", self.tracing.happened, Notice)
            events.subscribe("tracing_scores", self.tracing.scored, GoldenScored)
        if self.config.loop:
            events.subscribe("loops", self.loops.hear, DriftAlarm, JobEnded, GoldenScored)

    def doubted(self, error: LoradockError) -> LoradockError:
        """What to answer instead of this error, while what other servers did cannot be seen."""
        return self.follower.doubted(error) if self.follower else error

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """What opens is closed in reverse; what fails to close keeps nothing else from it."""
        async with AsyncExitStack() as closing:
            closing.push_async_callback(asyncio.to_thread, self.registry.close)
            closing.callback(self.store.close)
            if self.tokens:
                closing.callback(self.tokens.close)
            closing.push_async_callback(asyncio.to_thread, partial(self.audit.flush, everything=True))
            closing.push_async_callback(asyncio.to_thread, self.usage_ledger.close)
            if self.tracing:
                closing.push_async_callback(asyncio.to_thread, self.tracing.stop)
                self.tracing.start()
            closing.push_async_callback(asyncio.to_thread, self.events.stop)
            self.events.start()
            closing.push_async_callback(self.fleet.stop)
            closing.push_async_callback(self.lifecycle.settle)
            closing.push_async_callback(self._prefetcher.save)
            closing.push_async_callback(self._shadows.close)
            closing.push_async_callback(asyncio.to_thread, self.captures.stop)
            closing.push_async_callback(self.rollout_controller.close)
            closing.push_async_callback(asyncio.to_thread, self.exchange_worker.stop)
            if self.follower:
                closing.push_async_callback(self.follower.close)
            if self._guards:
                closing.push_async_callback(self._guards.close)
            await asyncio.to_thread(self.captures.start)
            if self.config.data_quality:
                closing.push_async_callback(asyncio.to_thread, self.quality_worker.stop)
                await asyncio.to_thread(self.quality_worker.start)
            closing.push_async_callback(self.background.stop)
            self._start_background_tasks()
            starting = asyncio.create_task(self._bring_up())
            closing.push_async_callback(_cancelled, starting)
            yield

    def _start_background_tasks(self) -> None:
        self.background.start("log_stats", self._log_stats)
        self.background.start("write_down_rollbacks", self.lifecycle.write_down)
        if self.tokens:
            self.background.start("oidc", self.tokens.run)
        self.background.start("audit", self.audit.run)
        self.background.start("history", partial(rotate_history, self.registry, self.config))
        self.background.start("prefetch", self._prefetcher.run)
        self.background.start("usage", self.usage_ledger.run)
        self.background.start("canary_verdicts", self.rollout_controller.run)
        if self.config.webhooks:
            self.background.start("webhooks", self._webhooks.run)
        if self.follower:
            self.background.start("registry_poll", self.follower.poll)
            self.background.start("registry_heartbeat", self.follower.heartbeat)
            self.background.start("swap_follower", self._swap_follower.run)

    async def _bring_up(self) -> None:
        """Start the engines; `on_failure` gets the error if one cannot."""
        try:
            await self.lifecycle.sweep()
            await self._prefetcher.load()
            await asyncio.to_thread(self.golden.results.refresh)
            models = {base.name: await self.lifecycle.swapped_model(base) or base.model for base in self.fleet}
            # The first answers are watched already.
            learning = self._watched_bases.learn(models) if self.config.drift else asyncio.sleep(0)
            await asyncio.gather(self.fleet.start(self.lifecycle), learning)
        except LoradockError as error:
            self._on_failure(error)
            return
        except Exception as error:
            log.exception("the server cannot start")
            self._on_failure(ConfigError(f"the server cannot start ({type(error).__name__}: {error}): see the log"))
            return
        self.ready.set()
        self.background.start("prober", self.prober.run)
        self.background.start("golden", self.golden.runs.run)
        self.background.start("batches", self.batches.schedule.run)
        self.background.start("fine_tuning", self.fine_tuning.schedule.run)
        if self.config.loop:
            self.background.start("loops", self.loops.schedule.run)
        if self.config.drift:
            self.background.start("watched_bases", self._watched_bases.run)

    @property
    def degraded(self) -> dict[str, str]:
        """What does not work, though requests are answered, by name."""
        problems = self.background.problems
        if self.registry.standing:
            problems["rollback"] = "a rollback holds on this server and waits for the registry"
        if self.follower and self.follower.problem:
            problems["registry"] = self.follower.problem
        if self._swap_follower.problem:
            problems["base_swap"] = self._swap_follower.problem
        return problems

    def check_started(self) -> None:
        """EngineUnavailable while the server starts, and as long as /ready says so."""
        if not self.ready.is_set():
            for base in self.fleet:
                if not base.is_ready:
                    raise base.unavailable()

    def live_version(self, full: str) -> int | None:
        """The number of the version of this adapter that is live, if there is such an adapter and version."""
        return _live_version(self.registry, full)

    def wants_logprobs(self, adapter: str) -> bool:
        """Whether a request to this adapter is answered with log-probabilities, unseen by the client.

        Decided before anybody knows which version answers, so that both sides of a canary are sampled alike.
        """
        if not self.exchange_worker.running:
            return False
        sampled = self._logprob_sampling.sampled(gathering=self.drift_monitor.lacks_logprobs(adapter))
        return sampled or self.canary_monitor.wants_logprobs(adapter)

    def withholds(self, adapter: str) -> bool:
        """What it answers is shown to clients past its guard alone."""
        return self.policies[adapter].guard.withholds

    def _exists(self, name: str) -> bool:
        """It is an adapter's full name, or a base's."""
        return name in self.registry or name in self.fleet

    def _count_usage(self, work: Work) -> None:
        self.usage_ledger.take(work, used := Usage.of(work, self.config.prices))
        self._usage_metrics.take(work.adapter, work.payer.tenant, used)

    async def _log_stats(self) -> None:
        while True:
            await asyncio.sleep(LOG_STATS_SECONDS)
            for base in self.fleet:
                with suppress(EngineUnavailable):
                    await base.backend.log_stats()


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _context_of(base: Supervisor) -> int:
    """The tokens that a base's context has room for; 0 while its engine is not there."""
    try:
        return base.backend.max_model_len
    except EngineUnavailable:
        return 0


def _base_of(fleet: Fleet, name: str) -> Supervisor:
    """Of an adapter; or of a base, by its own name."""
    return fleet.get(name) if name in fleet else fleet.of(name)


def _exists(fleet: Fleet, registry: Registry, name: str, id: str) -> bool:
    """Whether there is such a version of an adapter, or such a base."""
    if not id:
        return name in fleet
    return name in registry and any(adapter.id == id for adapter in registry.versions(name))


def _live_version(registry: Registry, name: str) -> int | None:
    live = registry.live(name) if name in registry else None
    return live.version if live else None
