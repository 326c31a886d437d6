"""Where each step of a loop is written: the adapter's history, the audit log, webhooks, metrics."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

from serve.adapters.registry.registry import Registry
from serve.auth.audit import Audit
from serve.errors import LoradockError
from serve.loop.metrics import LoopMetrics
from serve.loop.objects import Loop, Outcome
from serve.names import tenant_of

log = logging.getLogger(__name__)

# Who acts, in histories and the audit log.
WHO = "loop"
MAX_EVIDENCE = 2048


class Journal:
    """All of it blocks. `notify(type, data)` tells webhooks and the collector."""

    def __init__(
        self,
        registry: Registry,
        audit: Audit,
        metrics: LoopMetrics,
        notify: Callable[[str, Mapping[str, Any]], None],
    ) -> None:
        self._registry = registry
        self._audit = audit
        self.metrics = metrics
        self._notify = notify

    def step(
        self, loop: Loop, what: str, text: str, evidence: Mapping[str, Any] | None = None, *, by: str = WHO
    ) -> None:
        """`opened`, `given_up`, `training`, `gate`, `replay`, `forgetting`, `canary`, `asks`, or a try's outcome."""
        name, version = loop.name, loop.state.candidate or loop.state.live
        log.info("the loop of %s: %s: %s", name, what, text)
        data = {
            "adapter": name,
            "tenant": tenant_of(name),
            "try": loop.state.number,
            "phase": loop.phase.value,
            "live": loop.state.live or None,
            "candidate": loop.state.candidate or None,
            "text": text,
            "evidence": dict(evidence or {}),
        }
        try:
            if name in self._registry:
                self._registry.note(name, "loop", version, by=by, why=f"{what}: {text}")
        except LoradockError as error:
            log.warning("a step of the loop of %s is missing from its history: %s", name, error.message)
        self._audit.write(
            status=200,
            who=by,
            tenant=tenant_of(name),
            key=None,
            what=f"loop_{what}",
            subject=f"{name}@v{version}" if version else name,
            reason=text,
            evidence=json.dumps(dict(evidence or {}))[:MAX_EVIDENCE],
        )
        self._notify(f"loop.{what}", data)

    def ended(self, loop: Loop, outcome: Outcome, text: str, evidence: Mapping[str, Any], by: str = WHO) -> None:
        """A try is over."""
        self.metrics.ended(loop.name, outcome)
        self.step(loop, outcome.value, text, evidence, by=by)
