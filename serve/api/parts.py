"""What a route may depend on: it says which parts of the server it uses as parameters of these types."""

from typing import Annotated, Any

from fastapi import Depends, Request

from serve.adapters.registry.registry import Registry
from serve.adapters.store import Store
from serve.api.captures import Captures
from serve.api.deletion import Deletion
from serve.api.health import Health
from serve.api.incoming import Incoming
from serve.api.overview import Overview
from serve.api.rated_answers import RatedAnswers
from serve.api.removal import Removal
from serve.asgi.exchange_worker import ExchangeWorker
from serve.auth.auth import Auth
from serve.auth.keys import Keys
from serve.auth.rate_limits import Meters
from serve.config import Config
from serve.drift.baseline_build import BaselineBuild
from serve.drift.monitor import DriftMonitor
from serve.engine.fleet import Fleet
from serve.fleet.heartbeat import Heartbeat
from serve.fleet.server_messages import ServerMessages
from serve.gateway.auto import Auto
from serve.gateway.moderation import Moderator
from serve.gateway.router import Router
from serve.jobs.batches.batches import Batches
from serve.jobs.batches.files import Files
from serve.jobs.finetuning.finetuning import FineTuning
from serve.jobs.finetuning.validation import Validation
from serve.loop.loops import Loops
from serve.rollout.admit import VersionAdmission
from serve.rollout.alertmanager import Alerts
from serve.rollout.canary.canary_monitor import CanaryMonitor
from serve.rollout.canary.shadow_agreement import ShadowAgreement
from serve.rollout.golden.golden import Golden
from serve.rollout.lifecycle import Lifecycle
from serve.rollout.policy import Policies
from serve.rollout.registry_sync import RegistrySync
from serve.rollout.swap_follower import SwapFollower
from serve.telemetry.metrics import Metrics
from serve.telemetry.recent import Recent
from serve.telemetry.tracing.tracing import Tracing
from serve.telemetry.usage.usage_ledger import UsageLedger


def part(name: str) -> Any:
    """The dependency that gives a route this part of the server."""

    async def find(request: Request) -> Any:
        return getattr(request.app.state.parts, name)

    return Depends(find)


TheRegistry = Annotated[Registry, part("registry")]
TheFleet = Annotated[Fleet, part("fleet")]
TheRouter = Annotated[Router, part("router")]
TheAuto = Annotated[Auto, part("auto")]
TheLifecycle = Annotated[Lifecycle, part("lifecycle")]
TheAdmission = Annotated[VersionAdmission, part("admission")]
ThePolicies = Annotated[Policies, part("policies")]
TheGolden = Annotated[Golden, part("golden")]
TheDriftMonitor = Annotated[DriftMonitor, part("drift_monitor")]
TheCanaryMonitor = Annotated[CanaryMonitor, part("canary_monitor")]
TheShadowAgreement = Annotated[ShadowAgreement, part("shadow_agreement")]
TheExchangeWorker = Annotated[ExchangeWorker, part("exchange_worker")]
TheRecent = Annotated[Recent, part("recent")]
TheCaptures = Annotated[Captures, part("captures")]
TheLoops = Annotated[Loops, part("loops")]
TheFineTuning = Annotated[FineTuning, part("fine_tuning")]
TheValidation = Annotated[Validation, part("validation")]
TheBatches = Annotated[Batches, part("batches")]
TheFiles = Annotated[Files, part("files")]
TheConfig = Annotated[Config, part("config")]
TheStore = Annotated[Store, part("store")]
TheAuth = Annotated[Auth, part("auth")]
TheMeters = Annotated[Meters, part("meters")]
TheMetrics = Annotated[Metrics, part("metrics")]
TheKeys = Annotated[Keys, part("keys")]
TheRatedAnswers = Annotated[RatedAnswers, part("rated_answers")]
TheDeletion = Annotated[Deletion, part("deletion")]
TheTracing = Annotated[Tracing | None, part("tracing")]
TheBaselineBuild = Annotated[BaselineBuild, part("baseline_build")]
TheUsageLedger = Annotated[UsageLedger, part("usage_ledger")]
TheModerator = Annotated[Moderator, part("moderator")]
TheMessages = Annotated[ServerMessages | None, part("messages")]
TheFollower = Annotated[RegistrySync | None, part("follower")]
TheHeartbeat = Annotated[Heartbeat | None, part("heartbeat")]
TheSwapFollower = Annotated[SwapFollower, part("swap_follower")]
TheAlerts = Annotated[Alerts, part("alerting")]
TheHealth = Annotated[Health, part("health")]
TheRemoval = Annotated[Removal, part("removal")]
TheIncoming = Annotated[Incoming, part("incoming")]
TheOverview = Annotated[Overview, part("overview")]
