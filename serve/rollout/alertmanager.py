"""Alertmanager's webhook: an alert may roll a version back.

Only an alert that fires and is labelled `action="rollback"`, `adapter` and `version` does anything; the version that it
names loses its traffic, and no other. Alertmanager sends an alert again and again: one that was acted on, known by its
fingerprint and the time that it started, is not acted on twice, also not by the next process (the history knows it).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from typing import Annotated, Any

from msgspec import Meta, Struct

from serve.adapters.registry.registry import Registry
from serve.events import ROLLBACK as WHO
from serve.names import shown
from serve.rollout.policy import ROLLBACK, Policies
from serve.rollout.rollback import AutomaticRollback

ACTION = "rollback"
REASON = "alert"
MAX_ALERTS = 1000

_VERSION = re.compile(r"v?([1-9][0-9]{0,8})")


class Alert(Struct, frozen=True):
    """One alert in Alertmanager's webhook (version 4); the fields that are not used here are left out."""

    status: str
    labels: dict[str, str]
    startsAt: Annotated[str, Meta(pattern="^[0-9TZ:.+-]{1,40}$")]
    fingerprint: Annotated[str, Meta(pattern="^[0-9a-f]{1,64}$")]
    annotations: dict[str, str] = {}

    @property
    def key(self) -> str:
        """The same each time that Alertmanager sends this outbreak of the alert."""
        return f"{self.fingerprint}@{self.startsAt}"


class Notification(Struct, frozen=True):
    """The body of `POST /v1/alerts`."""

    alerts: Annotated[list[Alert], Meta(max_length=MAX_ALERTS)]


class Alerts:
    """Acts on alerts, where the adapter's policy is to roll back without asking people."""

    def __init__(self, rollback: AutomaticRollback, registry: Registry, policies: Policies) -> None:
        self._rollback = rollback
        self._policies = policies
        self._registry = registry

    async def take(self, alert: Alert, *, may: bool, by: str) -> dict[str, Any]:
        """Act on one alert, and say what was done. `may`: the sender's key manages the adapter; `by`: who sent it."""
        outcome, message = await self._take(alert, may, by)
        name = alert.labels.get("alertname", "")
        return {"fingerprint": alert.fingerprint, "alert": shown(name, 128), "outcome": outcome, "message": message}

    async def _take(self, alert: Alert, may: bool, by: str) -> tuple[str, str]:
        labels = alert.labels
        if alert.status != "firing":
            return "ignored", "it does not fire"
        if labels.get("action") != ACTION:
            return "ignored", f'it has no label action="{ACTION}"'
        adapter, version = labels.get("adapter", ""), _VERSION.fullmatch(labels.get("version", ""))
        if not adapter or not version:
            return "ignored", "its labels name no adapter and version, as adapter=tone and version=v2"
        if not may or adapter not in self._registry:
            return "ignored", "this key manages no adapter of that name"
        if self._policies[adapter].worse != ROLLBACK:
            return "ignored", "this adapter's policy leaves the rollback to people"
        if await asyncio.to_thread(self._acted, adapter, alert.key):
            return "repeated", "it was acted on before"
        result = await self._rollback.rollback(adapter, int(version[1]), REASON, _evidence(alert, by))
        return result.outcome.value, result.message

    def _acted(self, adapter: str, key: str) -> bool:
        rows = reversed(self._registry.history(adapter))
        return any(row["who"] == WHO and key in row["why"] for row in rows)


def _evidence(alert: Alert, by: str) -> Mapping[str, Any]:
    """The key comes first: what is long is cut at its end."""
    annotations = {name: shown(text, 256) for name, text in alert.annotations.items() if name in ("summary", "value")}
    name = shown(alert.labels.get("alertname", ""), 128)
    return {"alert": name, "at": alert.key, "from": by, **annotations}
