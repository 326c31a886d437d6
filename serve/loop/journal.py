"""Where each step of a loop is told: the adapter's history here, everything else by an event; and counted."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from serve.adapters.registry.registry import Registry
from serve.errors import LoradockError
from serve.events import Events, LoopStepped
from serve.loop.metrics import LoopMetrics
from serve.loop.objects import Loop, Outcome

log = logging.getLogger(__name__)

# Who acts, in histories and the audit log.
WHO = "loop"


class Journal:
    """All of it blocks."""

    def __init__(self, registry: Registry, metrics: LoopMetrics, events: Events) -> None:
        self._registry = registry
        self.metrics = metrics
        self._events = events

    def step(
        self, loop: Loop, what: str, text: str, evidence: Mapping[str, Any] | None = None, *, by: str = WHO
    ) -> None:
        """`opened`, `given_up`, `training`, `gate`, `replay`, `forgetting`, `canary`, `asks`, or a try's outcome."""
        name, state = loop.name, loop.state
        log.info("the loop of %s: %s: %s", name, what, text)
        try:
            if name in self._registry:
                version = state.candidate or state.live
                self._registry.note(name, "loop", version, by=by, why=f"{what}: {text}")
        except LoradockError as error:
            log.warning("a step of the loop of %s is missing from its history: %s", name, error.message)
        evidence = dict(evidence or {})
        self._events.publish(
            LoopStepped(name, state.number, loop.phase.value, state.live, state.candidate, what, text, evidence, by)
        )

    def ended(self, loop: Loop, outcome: Outcome, text: str, evidence: Mapping[str, Any], by: str = WHO) -> None:
        """A try is over."""
        self.metrics.ended(loop.name, outcome)
        self.step(loop, outcome.value, text, evidence, by=by)
