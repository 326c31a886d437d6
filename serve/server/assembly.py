"""A server: all of its parts, each constructed with those that it works with, in one place."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial

from fastapi import FastAPI
from prometheus_client.registry import Collector

from serve.adapters.adapter import Adapter
from serve.adapters.byte_ledger import Kind
from serve.adapters.registry.registry import Registry
from serve.adapters.shared_store import SharedStore
from serve.adapters.sources.kind import offered
from serve.adapters.store import Store
from serve.api.app import app_of
from serve.api.background_tasks import BackgroundTasks
from serve.api.captures import Captures
from serve.api.deletion import DELETE, Deletion
from serve.api.health import Health
from serve.api.incoming import Incoming
from serve.api.overview import Overview
from serve.api.rated_answers import RATE, RatedAnswers
from serve.api.removal import Removal
from serve.api.resolver import FolderResolver
from serve.asgi.exchange import Exchange
from serve.asgi.exchange_worker import DroppedExchanges, ExchangeWorker
from serve.auth.audit import Audit
from serve.auth.auth import Auth, Caller
from serve.auth.body_memory import PART, BodyMemory
from serve.auth.keys import Keys
from serve.auth.rate_limits import Meter, Meters
from serve.auth.shared_limits import SharedLimits
from serve.config import Config
from serve.dataset.feedback import Feedback
from serve.drift.baseline_build import BaselineBuild
from serve.drift.monitor import DriftMonitor
from serve.drift.prober import Prober
from serve.drift.watched_bases import WatchedBases
from serve.engine.backend import Backend
from serve.engine.fleet import Fleet
from serve.engine.payer import Work
from serve.engine.supervisor import Supervisor
from serve.errors import ConfigError, EngineUnavailable, LoradockError, Unauthorized
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
from serve.fleet.heartbeat import Heartbeat, Listener, ThisServer
from serve.fleet.membership import Membership
from serve.fleet.server_messages import ServerMessages
from serve.gateway.auto import Auto
from serve.gateway.fan_out import RequestBounds
from serve.gateway.forwarding import Forwarding
from serve.gateway.guard import Guards
from serve.gateway.inference import Forwarder, Inference, Intake
from serve.gateway.internal_request import InternalRequests
from serve.gateway.logprob_sampling import LogprobSampling
from serve.gateway.moderation import Moderator
from serve.gateway.router import Router
from serve.gateway.server_load import ServerLoad
from serve.jobs.batches import build as batches
from serve.jobs.batches.files import Files
from serve.jobs.finetuning import build as finetuning
from serve.jobs.finetuning.admission import Admission
from serve.jobs.finetuning.validation import Validation
from serve.loop import build as loop
from serve.loop.loop_rows import LoopRows
from serve.loop.metrics import LoopMetrics
from serve.loop.tries import LoopTries
from serve.models.checkpoint import takes_media
from serve.models.hardware import node, on_cpu
from serve.models.host import Host
from serve.models.language import language_of
from serve.rollout.admit import VersionAdmission
from serve.rollout.alertmanager import Alerts
from serve.rollout.canary.canary_monitor import CanaryMonitor
from serve.rollout.canary.registered_analyses import RegisteredAnalyses
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
from serve.rollout.registry_sync import RegistrySync
from serve.rollout.rollback import AutomaticRollback
from serve.rollout.swap_follower import SwapFollower
from serve.rollout.webhook import Webhooks
from serve.server.lifetime import Lifetime, started
from serve.server.part_settings import (
    bound_tenants,
    drift_settings,
    rotate_history,
    supervisors,
    tokens_of,
    tracing,
    upload_limits,
)
from serve.telemetry.data_quality import DataQuality
from serve.telemetry.live_state import Objectives
from serve.telemetry.metrics import Metrics
from serve.telemetry.observers import ExchangeObservers
from serve.telemetry.recent import Recent
from serve.telemetry.series import AdapterLoads
from serve.telemetry.usage.usage_ledger import Usage, UsageLedger
from serve.telemetry.usage.usage_metrics import EngineBusy, UsageMetrics

log = logging.getLogger(__name__)

LOG_STATS_SECONDS = 10.0


class Server:
    """What `build_app` says of its arguments. Each part is built once those are there that it needs, room by room; what
    is told of what happens is in `_subscribe`, what starts and stops in `_lifetimes` and `_tasks`, and what has series
    in `_collectors`."""

    def __init__(
        self,
        config: Config,
        backends: Sequence[Backend],
        on_failure: Callable[[LoradockError], None] | None = None,
        on_shadow: Callable[[ShadowExchange], None] | None = None,
        replica: str = "",
        observers: Sequence[Callable[[Exchange], None]] = (),
    ) -> None:
        self.config = config
        self.events = Events()
        self.policies = Policies(config.policies)
        self.background = BackgroundTasks()
        self._me = ThisServer(replica or f"{node()}-{secrets.token_hex(4)}", node())
        self._on_failure = on_failure or log.error
        self._keep()
        self._answer(backends)
        self._tell()
        self._roll_out()
        self._watch()
        self._work()
        self._serve(on_shadow, observers)
        self._subscribe()
        for collector in self._collectors():
            self.metrics.watch(collector)

    # Rooms, in the order in which they need one another

    def _keep(self) -> None:
        """What is kept on disk, and who may ask for it."""
        config = self.config
        self.store = Store(config.data_dir, shared=SharedStore(config.blobs) if config.blobs else None)
        self.registry = Registry(config.registry_url, standing=config.data_dir / "rollbacks.json")
        bound_tenants(self.store.ledger, self.registry, config)
        self.keys = Keys(self.registry)
        issued, locked = self.keys.caller, lambda: self.keys.any
        self.tokens = tokens_of(config, self.registry)
        self.auth = Auth(
            config.api_keys, config.admin_keys, issued, locked, config.metrics_keys, self.keys.holder, self.tokens
        )
        self.meters = Meters(bodies=BodyMemory(Host().total_memory() // PART), shared=bool(config.registry))
        self.audit = Audit(config.data_dir / "audit.jsonl", max_bytes=config.audit_bytes, days=config.audit_days)

    def _answer(self, backends: Sequence[Backend]) -> None:
        """Engines, what is in them, and how a name becomes a version. A registry with a URL may have other servers."""
        config = self.config
        self._loads, popularity = AdapterLoads(), Popularity()
        self.usage_ledger = UsageLedger(self.registry, keep_days=config.usage_days)
        self._usage_metrics = UsageMetrics(config.currency, self._exists, limit=config.max_labelled_versions)
        self.fleet = Fleet(supervisors(config, backends, self._loads, self._count_usage), self.registry.base)
        self.membership = self._membership()
        self.forwarding = Forwarding(self.membership) if self.membership else None
        self.lifecycle = Lifecycle(
            self.fleet,
            self.registry,
            self.store,
            lambda base: upload_limits(config, base.backend),
            popularity,
            self.events,
            *([self.membership.is_home] if self.membership else []),
        )
        self._prefetcher = Prefetcher(self.fleet, self.lifecycle.adapters, popularity, config.data_dir / "popular.json")
        self.router = Router(
            self.fleet, self.registry, self.store, popularity.used, self.forwarding, shared=bool(config.registry)
        )
        messages = ServerMessages(self.registry, self._me.id)
        follower = RegistrySync(self.registry, self.keys, self.lifecycle, messages, config.registry_stale_seconds)
        self.messages = messages if config.registry else None
        self.follower = follower if config.registry else None
        listeners: list[Listener] = [SharedLimits(self.meters), messages]
        listeners += [self.membership] if self.membership else []
        heartbeat = Heartbeat(self.registry, self._me, lambda: str(self.fleet.first.phase), *listeners)
        self.heartbeat = heartbeat if config.registry else None
        living = heartbeat.living_ids if self.heartbeat else set
        self.swap_follower = SwapFollower(self.registry, self.fleet, me=self._me.id, living=living)
        self.health = Health(
            self.fleet, self.registry, self.background, self.follower, self.swap_follower, self.store.ledger
        )

    def _membership(self) -> Membership | None:
        """This server among those that it shares homes with."""
        if not (address := self.config.own_address):
            return None
        bases = [base.name for base in self.fleet]
        return Membership(self._me.id, address, bases, ServerLoad(self.fleet))

    def _tell(self) -> None:
        """Metrics, traces, webhooks."""
        config = self.config
        self.recent = Recent()
        self._feedback = Feedback()
        self.metrics = Metrics(
            self.fleet,
            self.registry,
            self.audit,
            self._loads,
            limit=config.max_labelled_versions,
            more=self._usage_metrics.families,
        )
        self.tracing = tracing(config, self._me.id, self.metrics.label)
        self._webhooks = Webhooks(
            config.data_dir / "webhooks", config.webhooks, config.webhook_secret, private=config.webhook_private
        )

    def _roll_out(self) -> None:
        """What becomes of versions: golden sets, canaries, admission, rollback."""
        config, registry = self.config, self.registry
        events, policies = self.events, self.policies
        store = GoldenStore(registry, me=self._me.id)
        results = GoldenResults(store, registry, self.metrics.label)
        verdicts = GoldenVerdicts(store, results, registry, policies, events)
        self._loop_rows = LoopRows(registry, me=self._me.id)
        analyses = RegisteredAnalyses(registry, me=self._me.id, shared=bool(config.registry))
        self.tries = LoopTries(self._loop_rows, analyses)
        folder, label = config.data_dir / "drift", self.metrics.label
        self.canary_monitor = CanaryMonitor(folder, registry, policies, verdicts, self.tries, events, label=label)
        self.admission = VersionAdmission(self.lifecycle, registry, verdicts, self.canary_monitor, policies)
        runner = GoldenRunner(self.fleet, self.store, self._judge)
        runs = GoldenRuns(
            results,
            runner,
            verdicts,
            GoldenFalls(store, results, registry, events),
            HeldPromotions(store, results, registry, policies, self.admission),
            events,
            interval=config.golden_interval,
            meter_of=self._meter_of,
        )
        self.golden = Golden(store, results, verdicts, runner, runs)
        self.automatic_rollback = AutomaticRollback(self.lifecycle, registry, events)
        self.alerting = Alerts(self.automatic_rollback, registry, policies)
        self.rollout_controller = RolloutController(
            self.automatic_rollback,
            self.lifecycle,
            registry,
            self.canary_monitor,
            verdicts,
            self.tries,
            policies,
            events,
        )

    def _watch(self) -> None:
        """What looks at answers, and what is kept of them. Data quality has a worker of its own: it looks at every
        request, of models too that are not watched for drift."""
        config, label = self.config, self.metrics.label
        self.drift_monitor = DriftMonitor(
            config.data_dir / "drift",
            drift_settings(config),
            base_of=lambda adapter: _base_of(self.fleet, adapter).name,
            events=self.events,
            label=label,
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
        self.quality_worker = ExchangeWorker([self._data_quality], name="data-quality")
        self.exchange_worker = ExchangeWorker([self.canary_monitor, self.drift_monitor])
        self.shadow_agreement = ShadowAgreement(label)
        self.auto = Auto(self.router, self.policies, self.drift_monitor.fits, self.exchange_worker.submit)
        self.baseline_build = BaselineBuild(self.fleet, self.store)
        kept = config.cache_dir / "embeddings"
        self._watched_bases = WatchedBases(self.fleet, self.drift_monitor, self.exchange_worker, kept)
        self._logprob_sampling = LogprobSampling(config.drift_logprobs, by_request=not on_cpu())
        interval = config.drift_probe_interval
        self.prober = Prober(self.fleet, self.registry, self.store, self.drift_monitor, self.events, interval=interval)
        self.captures = Captures(
            config,
            self.fleet,
            self.registry,
            self.store.ledger,
            self.golden,
            self.policies,
            lambda adapter: _base_of(self.fleet, adapter).model,
        )

    def _work(self) -> None:
        """What the server does for clients by itself. Without a policy that has a guard there are no guards."""
        config = self.config
        requests = InternalRequests(self.router, self.meters, self._bounds)
        self.moderator = Moderator(
            requests,
            model=config.moderation_model,
            prompt=config.moderation_prompt,
            categories=config.moderation_categories,
        )
        self._every_guard = Guards(self.moderator, lambda adapter: self.policies[adapter].guard)
        self._guards = self._every_guard if any(policy.guard for policy in self.policies) else None
        self.files = Files(self.registry, self.store, batches.limits_of(config))
        self.batches = batches.build(
            self.registry,
            self.store,
            self.files,
            self.auth,
            self.router,
            requests,
            self._guards,
            self.follower,
            self._me.id,
            self.auto,
        )
        self.fine_tuning = finetuning.build(
            config,
            self.store,
            self.router,
            self.files,
            Admission(self.admission, self.lifecycle, self.store, self.auth),
            self.events,
            lambda base: upload_limits(config, base.backend).max_rank,
            self._me.id,
        )
        self.validation = Validation(self.router, self.store, self.files, self.fine_tuning.runner.process)
        self._loop_metrics = LoopMetrics(self.metrics.labelled)
        self.loops = loop.build(
            config,
            self._loop_rows,
            self.lifecycle,
            self.admission,
            self.golden,
            self.fine_tuning,
            self.files,
            self.captures.datasets,
            self.drift_monitor,
            self.fleet,
            self.store,
            self.auth,
            self._loop_metrics,
            self.events,
        )

    def _serve(
        self,
        on_shadow: Callable[[ShadowExchange], None] | None,
        observers: Sequence[Callable[[Exchange], None]],
    ) -> None:
        """What routes use beside all that."""
        config, tracing = self.config, self.tracing
        self.rated_answers = RatedAnswers(
            self._feedback,
            self.captures,
            self.policies,
            self.loops,
            self.metrics,
            tracing,
            self.exchange_worker,
            self.canary_monitor,
        )
        self.deletion = Deletion(self.captures.datasets, self.loops)
        self.removal = Removal(self.lifecycle, self.drift_monitor, self.golden, config.keep_unloaded)
        self.incoming = Incoming(config, self.store, self.lifecycle, self.admission, self.removal)
        self.overview = Overview(
            self.lifecycle,
            self.recent,
            self.golden,
            self.drift_monitor,
            self.canary_monitor,
            self.shadow_agreement,
            self.exchange_worker,
            config.grafana_url,
        )
        self._shadows = Shadows(
            self.fleet,
            self.store,
            self.metrics.shadowed,
            on_shadow,
            limit=config.max_shadows,
            agreement=self.shadow_agreement,
            grade=self.golden.grade_shadow,
            tracer=tracing,
        )
        looks: list[Callable[[Exchange], None]] = [
            self.metrics.take,
            self._feedback.remember,
            self.exchange_worker.offer,
        ]
        looks += [self.quality_worker.offer] if config.data_quality else []
        looks += [*self.captures.takes, self.recent.take, *([tracing.take] if tracing else []), *observers]
        resolver = FolderResolver(config, self.registry, self.incoming, self.health, self.audit)
        intake = Intake(
            self.auth,
            self.meters,
            self.router,
            Forwarder(self.router, self._guards, self._shadows, self.wants_logprobs),
            self._bounds,
            media=any(takes_media(base.model) for base in config.bases),
            resolver=resolver if config.resolver_folder else None,
            auto=self.auto,
        )
        take = ExchangeObservers(looks, self.metrics.tap_took).take
        self.inference = Inference(intake, take, tracing, self.follower, config.client_timeout)

    # What they have in common

    def _subscribe(self) -> None:
        """Who is told of what happens: a line each."""
        events, runs = self.events, self.golden.runs
        events.at_once("metrics", self.metrics.count, Promoted, RolledBack, Unloaded, RollbackAttempted)
        events.at_once("golden", lambda event: runs.wake(), VersionAdded, PromotionHeld, BaseSwapped)
        events.at_once("fine_tuning", self.fine_tuning.metrics.count, JobEnded)
        events.at_once("canaries", self.rollout_controller.hear, CanaryVerdict)
        events.subscribe("audit", self.audit.record, Recorded)
        events.subscribe("history", self.rollout_controller.note_alarm, DriftAlarm)
        events.subscribe("webhooks", self._webhooks.tell, Notice)
        if self.tracing:
            events.subscribe("tracing", self.tracing.happened, Notice)
            events.subscribe("tracing_scores", self.tracing.scored, GoldenScored)
        if self.config.loop:
            events.subscribe("loops", self.loops.hear, DriftAlarm, JobEnded, GoldenScored)

    def _collectors(self) -> list[Collector]:
        """Whose series are in `/metrics`."""
        return [
            Objectives(self.config.slos),
            EngineBusy(self.fleet),
            DroppedExchanges(capture=self.captures.worker, data_quality=self.quality_worker),
            self.events,
            self.background,
            self.health,
            self.drift_monitor,
            self.canary_monitor,
            self.rollout_controller,
            self.golden.results,
            self.shadow_agreement,
            self.exchange_worker,
            self._data_quality,
            self._webhooks,
            self.auto,
            self._every_guard,  # the series is there, and empty, where no policy has a guard
            self.batches.metrics,
            self.fine_tuning.metrics,
            self._loop_metrics,
            *([self.tracing] if self.tracing else []),
            *([self.forwarding] if self.forwarding else []),
            *([self.follower] if self.follower else []),
        ]

    def _lifetimes(self) -> list[Lifetime]:
        """What is started in this order, and stopped in reverse."""
        none = Lifetime()
        return [
            Lifetime(stop=self.registry.close),
            Lifetime(stop=self.store.close),
            Lifetime(stop=self.tokens.close) if self.tokens else none,
            Lifetime(stop=partial(self.audit.flush, everything=True)),
            Lifetime(stop=self.usage_ledger.close),
            Lifetime(self.tracing.start, self.tracing.stop) if self.tracing else none,
            Lifetime(self.events.start, self.events.stop),
            Lifetime(stop=self.fleet.stop),
            Lifetime(stop=self.lifecycle.settle),
            Lifetime(stop=self._prefetcher.save),
            Lifetime(stop=self._shadows.close),
            Lifetime(self.captures.start, self.captures.stop),
            Lifetime(stop=self.rollout_controller.close),
            Lifetime(stop=self.exchange_worker.stop),
            Lifetime(stop=self.follower.close) if self.follower else none,
            Lifetime(stop=self.forwarding.close) if self.forwarding else none,
            Lifetime(stop=self.heartbeat.close) if self.heartbeat else none,
            Lifetime(stop=self._guards.close) if self._guards else none,
            Lifetime(self.quality_worker.start, self.quality_worker.stop) if self.config.data_quality else none,
            Lifetime(stop=self.background.stop),
        ]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The server's lifetime."""
        async with started(self._lifetimes()):
            self._start_background_tasks()
            starting = asyncio.create_task(self._bring_up())
            try:
                yield
            finally:
                starting.cancel()
                await asyncio.gather(starting, return_exceptions=True)

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
            self.background.start("swap_follower", self.swap_follower.run)
            self.background.start("deleted_conversations", self.captures.follow_deletions)
        if self.messages:
            self.messages.read_by(RATE, self.rated_answers.rate_for_another)
            self.messages.read_by(DELETE, self.deletion.delete_for_another)
            self.background.start("server_messages", self.messages.run)
        if self.membership and self.store.shared:
            self.background.start("evict", self.lifecycle.evict)
        if self.heartbeat:
            self.background.start("registry_heartbeat", self.heartbeat.run)

    async def _bring_up(self) -> None:
        """Start the engines; `on_failure` gets the error if one cannot."""
        try:
            await self.lifecycle.sweep()
            await self._prefetcher.load()
            await asyncio.to_thread(self.golden.results.refresh)
            models = {base.name: await self.lifecycle.adapters.swapped_model(base) or base.model for base in self.fleet}
            # The first answers are watched already.
            learning = self._watched_bases.learn(models) if self.config.drift else asyncio.sleep(0)
            await asyncio.gather(self.fleet.start(self.lifecycle.adapters), learning)
            self.auto.look()
            await asyncio.to_thread(self.exchange_worker.settle)  # the first answers of `auto` are chosen already
        except LoradockError as error:
            self._on_failure(error)
            return
        except Exception as error:
            log.exception("the server cannot start")
            self._on_failure(ConfigError(f"the server cannot start ({type(error).__name__}: {error}): see the log"))
            return
        self.health.ready.set()
        self.background.start("golden", self.golden.runs.run)
        self.background.start("batches", self.batches.schedule.run)
        self.background.start("fine_tuning", self.fine_tuning.schedule.run)
        if self.config.loop:
            self.background.start("loops", self.loops.schedule.run)
        if self.config.drift:
            self.background.start("watched_bases", self._watched_bases.run)
            self.background.start("prober", self.prober.run)

    def doubted(self, error: LoradockError) -> LoradockError:
        """What to answer instead of this error, while what other servers did cannot be seen."""
        return self.follower.doubted(error) if self.follower else error

    def wants_logprobs(self, adapter: str) -> bool:
        """Whether a request to this adapter is answered with log-probabilities, unseen by the client.

        Decided before anybody knows which version answers, so that both sides of a canary are sampled alike.
        """
        if not self.exchange_worker.running:
            return False
        sampled = self._logprob_sampling.sampled(gathering=self.drift_monitor.lacks_logprobs(adapter))
        return sampled or self.canary_monitor.wants_logprobs(adapter)

    @property
    def _bounds(self) -> RequestBounds:
        return RequestBounds(self.config.max_sequences, self.config.max_prompt_logprobs, self.config.max_batch)

    def _judge(self, model: str, tenant: str) -> Adapter | None:
        """The version that a judge's name means to a tenant now; None for a base."""
        return self.router.resolve(model, Caller("golden", frozenset(), tenant))

    def _meter_of(self, key: str) -> Meter | None:
        """The meter of the key with this id; None if it has no limits, or is not taken any more."""
        try:
            caller = self.auth.holder(key)
        except Unauthorized:
            return None
        return self.meters.of(caller.key, caller.limits)

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


def build_app(
    config: Config,
    backend: Backend | Sequence[Backend],
    on_failure: Callable[[LoradockError], None] | None = None,
    on_shadow: Callable[[ShadowExchange], None] | None = None,
    replica: str = "",
    observers: Sequence[Callable[[Exchange], None]] = (),
) -> FastAPI:
    """The whole server over `backend`, or several, one for each base model; the first answers who names none.

    `on_failure` hears of an engine that cannot start.

    `on_shadow` gets every request that a shadow answered too, with both answers.

    `replica` is this server's name among those that share its registry.

    `observers` get each exchange when it has ended, on the event loop.
    """
    offered()  # a package whose source cannot be loaded is told now, and none is looked for while requests wait
    backends = backend if isinstance(backend, Sequence) else [backend]
    return app_of(Server(config, backends, on_failure, on_shadow, replica, observers))
