"""The parts of a server that work for clients by themselves: batches, moderations, guards, fine-tuning, loops."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from serve.adapters.registry.registry import Registry
from serve.adapters.store import Store
from serve.api.part_settings import upload_limits
from serve.auth.audit import Audit
from serve.auth.auth import Auth
from serve.auth.rate_limits import Meter, Meters
from serve.config import Config
from serve.dataset.datasets import Datasets
from serve.drift.monitor import DriftMonitor
from serve.engine.fleet import Fleet
from serve.errors import LoradockError, Unauthorized
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
from serve.loop.causes import Ratings
from serve.loop.gathering import gathering
from serve.loop.likelihood import LikelihoodScorer
from serve.loop.loop_rows import LoopRows
from serve.loop.loops import Loops
from serve.models import hardware
from serve.models.checkpoint import takes_media
from serve.rollout.golden.golden import Golden
from serve.rollout.lifecycle import Lifecycle
from serve.rollout.policy import policy_for
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
    monitor: Metrics
    follower: RegistrySync | None
    fleet: Fleet
    lifecycle: Lifecycle
    golden: Golden
    audit: Audit
    drift_monitor: DriftMonitor

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
    every = Guards(moderator, lambda adapter: policy_for(config.policies, adapter).guard)
    parts.monitor.watch(every)  # the series is there, and empty, where no policy has a guard
    guards = every if any(policy.guard for policy in config.policies) else None
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
    parts.monitor.watch(batches.metrics)
    return batches, moderator, guards


def fine_tuning(parts: Parts, router: Router, batches: Batches, me: str) -> FineTuning:
    """Over the parts that are there already; its files are those of the batches."""
    config, fleet = parts.config, parts.fleet
    admission = Admission(
        parts.lifecycle,
        parts.registry,
        parts.store,
        parts.auth,
        came=parts.golden.runs.wake,
        promoted=lambda name: parts.monitor.swapped(name, "promoted"),
    )
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
    parts.monitor.watch(jobs.metrics)
    return jobs


def loops(
    parts: Parts,
    jobs: FineTuning,
    files: Batches,
    datasets: Datasets,
    notify: Callable[[str, Mapping[str, Any]], None],
    me: str,
) -> Loops:
    """Over the parts that are there already; its jobs and their files are like those that clients make."""
    config, registry = parts.config, parts.registry
    rows = LoopRows(registry, me=me)
    candidates = Candidates(rows, jobs, files, parts.auth, gathering(datasets), woken=jobs.schedule.wake)
    made = Loops(
        rows,
        registry,
        parts.lifecycle,
        parts.golden,
        candidates,
        LikelihoodScorer(parts.fleet, parts.store),
        datasets.rows,
        parts.audit,
        policy=lambda adapter: policy_for(config.policies, adapter).loop,
        alone=not config.registry,
        drifted=parts.drift_monitor.summary,
        anew=parts.drift_monitor.begin_prompts_anew,
        notify=notify,
        swapped=parts.monitor.swapped,
        labelled=parts.monitor.labelled,
        servers=lambda: len(parts.follower.replicas()) if parts.follower else 1,
        file_seconds=max(config.batch_file_days * 86_400.0, EXPIRY.stop),
        ratings=Ratings(lambda adapter: policy_for(config.policies, adapter).verdicts.ratings_per_key),
    )
    parts.monitor.watch(made.metrics)
    return made


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
