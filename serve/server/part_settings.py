"""What single parts of a server take of its configuration."""

from __future__ import annotations

import asyncio
import dataclasses
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from serve.adapters.adapter import Limits
from serve.adapters.byte_ledger import Bound, ByteLedger, Kind
from serve.adapters.registry.registry import Registry
from serve.config import Config
from serve.config.identity import provider_of
from serve.drift.watched_version import DriftSettings
from serve.engine.backend import Backend
from serve.engine.effect_probe import Probe
from serve.engine.engine import Engine
from serve.engine.payer import Work
from serve.engine.restarts import Patience, StartTurn
from serve.engine.supervisor import Supervisor
from serve.models.lora_modules import kept_lora_modules
from serve.rollout.quotas import kept_bytes
from serve.telemetry.series import AdapterLoads
from serve.telemetry.tracing.tracing import Tracing, open_tracing

if TYPE_CHECKING:
    from serve.auth.oidc import Tokens


def drift_settings(config: Config) -> DriftSettings:
    """How versions are watched."""
    return DriftSettings(
        threshold=config.drift_threshold,
        reference=config.drift_reference,
        interval=config.drift_interval,
        versions=config.drift_versions,
        capture=config.capture,
        redact=tuple(re.compile(pattern) for pattern in config.capture_redact),
        quote_seconds=config.capture_hours * 3600,
    )


def upload_limits(config: Config, backend: Backend) -> Limits:
    """What an upload may be, here."""
    rank = backend.max_lora_rank
    return Limits(
        max_rank=min(rank, config.max_adapter_rank or rank),
        allowed_target_modules=frozenset(config.allowed_target_modules) or None,
        allowed_licenses=frozenset(license.lower() for license in config.allowed_licenses) or None,
        allowed_digests=frozenset(config.allowed_digests) or None,
        conversion_error=config.conversion_error,
    )


def bound_tenants(ledger: ByteLedger, registry: Registry, config: Config) -> None:
    """What each tenant may have on the disk, beside the versions that its keys' quotas are about."""
    ledger.counts(Kind.ADAPTERS, partial(kept_bytes, registry))
    most = config.tenant_bytes or config.batch_tenant_bytes + (16 << 30)
    kinds = frozenset(Kind) - {Kind.ADAPTERS, Kind.BASELINES}
    ledger.bound(
        Bound(kinds, most, "uploads, files, training and captured requests", "delete or cancel some"),
        # The server writes most of them by itself: they leave no less room for the others.
        Bound(frozenset({Kind.BASELINES}), most, "baselines", "delete versions"),
    )


def tokens_of(config: Config, registry: Registry) -> Tokens | None:
    """Of the identity provider that the configuration names."""
    provider = provider_of(config)
    if provider is None:
        return None
    # Not for those without one: it takes a cryptographic library.
    from serve.auth.jwks import KeySet
    from serve.auth.oidc import Tokens
    from serve.auth.subjects import Subjects

    return Tokens(provider, KeySet(provider.issuer, provider.jwks), Subjects(registry, provider.limits))


async def rotate_history(registry: Registry, config: Config) -> None:
    """Keep histories short, now and then."""
    while True:
        archive = config.data_dir / "history.jsonl"
        if not await asyncio.to_thread(registry.rotate_history, config.history_rows, archive):
            await asyncio.sleep(3600.0)


def supervisors(
    config: Config, backends: Sequence[Backend], loads: AdapterLoads, on_work: Callable[[Work], None]
) -> list[Supervisor]:
    """One for each engine; `on_work` hears what they compute, and for whom."""
    patience = Patience(**{field.name: getattr(config, field.name) for field in dataclasses.fields(Patience)})

    def probe(engine: Engine) -> Probe | None:
        if not config.probe:
            return None
        return Probe(engine, min_effect=config.probe_min_effect, max_perplexity=config.probe_max_perplexity)

    known = partial(kept_lora_modules, cache=config.cache_dir / "modules")
    engine = partial(Engine, on_load=loads.observe, on_work=on_work)
    more: dict[str, Any] = {
        "tolerance": config.swap_tolerance,
        "engine_of": engine,
        "modules_of": known,
        "turn": StartTurn(),
    }
    return [Supervisor(backend, probe, patience, **more) for backend in backends]


def tracing(config: Config, instance: str, label: Callable[[str, str], tuple[str, str]]) -> Tracing | None:
    """None unless OpenTelemetry's variables ask for it."""
    return open_tracing(
        config.otel,
        tenant=config.otel_tenant,
        instance=instance,
        label=label,
        engine_traces=any(base.engine.get("otlp_traces_endpoint") for base in config.bases),
    )
