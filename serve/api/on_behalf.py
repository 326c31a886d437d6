"""The parts of a server that work for clients by themselves: batches, moderations, guards, fine-tuning, loops."""

from __future__ import annotations

from typing import Protocol

from serve.adapters.registry.registry import Registry
from serve.adapters.store import Store
from serve.api.part_settings import upload_limits
from serve.auth.auth import Auth
from serve.auth.rate_limits import Meter, Meters
from serve.config import Config
from serve.dataset.datasets import Datasets
from serve.drift.monitor import DriftMonitor
from serve.engine.fleet import Fleet
from serve.errors import LoradockError, Unauthorized
from serve.events import Events
from serve.gateway.fan_out import RequestBounds
from serve.gateway.guard import Guards
from serve.gateway.internal_request import InternalRequests
from serve.gateway.moderation import Moderator
from serve.gateway.request import MEDIA_BYTES, TEXT_BYTES
from serve.gateway.router import Router
from serve.jobs.batches.batches import EXPIRY, Batches
from serve.jobs.batches.objects import Limits
from serve.jobs.finetuning.admission import Admission
from serve.jobs.finetuning.finetuning import FineTuning
from serve.jobs.finetuning.objects import Limits as JobLimits
from serve.jobs.finetuning.objects import Where
from serve.loop.candidates import Candidates
from serve.loop.causes import Causes, Ratings
from serve.loop.driver import LoopDriver
from serve.loop.gatekeeper import Gatekeeper
from serve.loop.gathering import gathering
from serve.loop.journal import Journal
from serve.loop.likelihood import LikelihoodScorer
from serve.loop.loop_rows import LoopRows
from serve.loop.loops import Loops
from serve.loop.metrics import LoopMetrics
from serve.loop.replays import Replays
from serve.loop.schedule import LoopSchedule
from serve.models import hardware
from serve.models.checkpoint import takes_media
from serve.rollout.admit import VersionAdmission
from serve.rollout.golden.golden import Golden
from serve.rollout.lifecycle import Lifecycle
from serve.rollout.policy import Policies
from serve.rollout.registry_sync import RegistrySync
from serve.telemetry.metrics import Metrics

# Of an engine that no client waits for: four keep a processor busy; on a GPU a quarter of the fewest seats that vLLM
# takes there.
BATCH_LINES, BATCH_LINES_ON_GPU = 4, 64


class Parts(Protocol):
    """What they need of a server."""

    config: Config
    registry: Registry
    store: Store
    auth: Auth
    meters: Meters
    metrics: Metrics
    follower: RegistrySync | None
    fleet: Fleet
    lifecycle: Lifecycle
    golden: Golden
    drift_monitor: DriftMonitor
    events: Events
    policies: Policies
    admission: VersionAdmission

    def doubted(self, error: LoradockError) -> LoradockError: ...


def on_behalf(parts: Parts, router: Router, me: str) -> tuple[Batches, Moderator, Guards | None]:
    """Over the parts that are there already; `me` is this server's name.

    Without a policy that has a guard there are no guards.
    """
    config = parts.config
    bounds = RequestBounds(config.max_sequences, config.max_prompt_logprobs, config.max_batch)
    requests = InternalRequests(router, parts.meters, bounds)
    moderator = Moderator(
        requests,
        model=config.moderation_model,
        prompt=config.moderation_prompt,
        categories=config.moderation_categories,
    )
    every = Guards(moderator, lambda adapter: parts.policies[adapter].guard)
    parts.metrics.watch(every)  # the series is there, and empty, where no policy has a guard
    guards = every if any(policy.guard for policy in parts.policies) else None
    batches = Batches(
        parts.registry,
        parts.store,
        parts.auth,
        router,
        requests,
        guards,
        limits=_limits(config),
        me=me,
        alone=not config.registry,
        fresh=parts.follower.fresh if parts.follower else None,
        doubted=parts.doubted,
    )
    parts.metrics.watch(batches.metrics)
    return batches, moderator, guards


def fine_tuning(parts: Parts, router: Router, batches: Batches, me: str) -> FineTuning:
    """Over the parts that are there already; its files are those of the batches."""
    config, fleet = parts.config, parts.fleet
    admission = Admission(parts.admission, parts.lifecycle, parts.store, parts.auth)
    jobs = FineTuning(
        parts.registry,
        parts.store,
        fleet,
        router,
        batches,
        admission,
        limits=JobLimits(config.finetune_open, config.finetune_hours),
        me=me,
        alone=not config.registry,
        max_rank=lambda base: upload_limits(config, base.backend).max_rank,
        is_busy=lambda: sum(base.leases - base.background for base in fleet) > config.finetune_load,
        where=Where(config.finetune_on),
        max_bytes=config.max_upload_bytes,
        file_seconds=config.batch_file_days * 86_400.0,
    )
    parts.metrics.watch(jobs.metrics)
    return jobs


def loops(parts: Parts, jobs: FineTuning, files: Batches, datasets: Datasets, rows: LoopRows) -> Loops:
    """Over the parts that are there already; its jobs and their files are like those that clients make."""
    config, registry = parts.config, parts.registry
    policies = parts.policies
    metrics = LoopMetrics(parts.metrics.labelled)
    ratings = Ratings(lambda adapter: policies[adapter].verdicts.ratings_per_key)
    candidates = Candidates(rows, jobs, files, parts.auth, gathering(datasets))
    scorer = LikelihoodScorer(parts.fleet, parts.store)
    driver = LoopDriver(
        rows,
        parts.lifecycle,
        parts.admission,
        candidates,
        Gatekeeper(rows, scorer, parts.golden, Replays(rows, datasets.rows, parts.golden)),
        Causes(parts.drift_monitor, registry.history, ratings),
        Journal(registry, metrics, parts.events),
    )
    schedule = LoopSchedule(rows, registry, driver, metrics, policies, alone=not config.registry)
    parts.metrics.watch(metrics)
    file_seconds = max(config.batch_file_days * 86_400.0, EXPIRY.stop)
    return Loops(rows, policies, candidates, driver, schedule, ratings, file_seconds=file_seconds)


def meter_of(auth: Auth, meters: Meters, key: str) -> Meter | None:
    """The meter of the key with this id; None if it has no limits, or is not taken any more."""
    try:
        caller = auth.holder(key)
    except Unauthorized:
        return None
    return meters.of(caller.key, caller.limits)


def _limits(config: Config) -> Limits:
    media = any(takes_media(base.model) for base in config.bases)
    return Limits(
        file_bytes=config.batch_file_bytes,
        tenant_files=config.batch_tenant_files,
        tenant_bytes=config.batch_tenant_bytes,
        lines=config.batch_lines,
        line_bytes=MEDIA_BYTES if media else TEXT_BYTES,
        open=config.batch_open,
        window_hours=config.batch_hours,
        file_seconds=config.batch_file_days * 86_400.0,
        concurrency=config.batch_concurrency or (BATCH_LINES if hardware.on_cpu() else BATCH_LINES_ON_GPU),
    )
