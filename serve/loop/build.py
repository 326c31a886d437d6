"""Loops as a server has them: over its parts; their jobs and files are like those that clients make."""

from __future__ import annotations

from serve.adapters.store import Store
from serve.auth.auth import Auth
from serve.config import Config
from serve.dataset.datasets import Datasets
from serve.drift.monitor import DriftMonitor
from serve.engine.fleet import Fleet
from serve.events import Events
from serve.jobs.batches.files import EXPIRY, Files
from serve.jobs.finetuning.finetuning import FineTuning
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
from serve.rollout.admit import VersionAdmission
from serve.rollout.golden.golden import Golden
from serve.rollout.lifecycle import Lifecycle


def build(
    config: Config,
    rows: LoopRows,
    lifecycle: Lifecycle,
    admission: VersionAdmission,
    golden: Golden,
    jobs: FineTuning,
    files: Files,
    datasets: Datasets,
    drift_monitor: DriftMonitor,
    fleet: Fleet,
    store: Store,
    auth: Auth,
    metrics: LoopMetrics,
    events: Events,
) -> Loops:
    registry, policies = lifecycle.registry, admission.policies
    ratings = Ratings(lambda adapter: policies[adapter].verdicts.ratings_per_key)
    candidates = Candidates(rows, jobs, files, auth, gathering(datasets))
    driver = LoopDriver(
        rows,
        lifecycle,
        admission,
        candidates,
        Gatekeeper(rows, LikelihoodScorer(fleet, store), golden, Replays(rows, datasets.traffic.rows, golden)),
        Causes(drift_monitor, registry.history, ratings),
        Journal(registry, metrics, events),
    )
    schedule = LoopSchedule(rows, registry, driver, metrics, policies, alone=not config.registry)
    file_seconds = max(config.batch_file_days * 86_400.0, EXPIRY.stop)
    return Loops(rows, policies, candidates, driver, schedule, ratings, file_seconds=file_seconds)
