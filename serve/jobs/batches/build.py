"""Batches as a server has them: over its parts, with the limits of its configuration."""

from __future__ import annotations

from serve.adapters.registry.registry import Registry
from serve.adapters.store import Store
from serve.auth.auth import Auth
from serve.config import Config
from serve.gateway.auto import Auto
from serve.gateway.guard import Guards
from serve.gateway.internal_request import InternalRequests
from serve.gateway.request import MEDIA_BYTES, TEXT_BYTES
from serve.gateway.router import Router
from serve.jobs.batches.answers import AnswerFiles
from serve.jobs.batches.batch_rows import BatchRows
from serve.jobs.batches.batch_runner import BatchRunner
from serve.jobs.batches.batches import Batches
from serve.jobs.batches.files import Files
from serve.jobs.batches.line_runner import LineRunner
from serve.jobs.batches.metrics import BatchMetrics
from serve.jobs.batches.objects import Limits
from serve.jobs.batches.schedule import BatchSchedule
from serve.models import hardware
from serve.models.checkpoint import takes_media
from serve.rollout.registry_sync import RegistrySync

# Of an engine that no client waits for: four keep a processor busy; on a GPU a quarter of the fewest seats that vLLM
# takes there.
BATCH_LINES, BATCH_LINES_ON_GPU = 4, 64


def build(
    registry: Registry,
    store: Store,
    files: Files,
    auth: Auth,
    router: Router,
    requests: InternalRequests,
    guards: Guards | None,
    follower: RegistrySync | None,
    me: str,
    auto: Auto,
) -> Batches:
    """`me` is this server's name; without a `follower` nobody shares the registry."""
    rows, metrics = BatchRows(registry, files.limits, me=me), BatchMetrics()
    answers = AnswerFiles(store.root / "files/answers", store.shared, rows, store.ledger)
    lines = LineRunner(auth, router, requests, guards, follower, auto, concurrency=files.limits.concurrency)
    runner = BatchRunner(rows, files, answers, lines, metrics)
    schedule = BatchSchedule(rows, files, answers, runner, metrics, alone=follower is None)
    return Batches(files, rows, schedule, metrics)


def limits_of(config: Config) -> Limits:
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
