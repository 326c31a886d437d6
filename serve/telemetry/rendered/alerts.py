"""The form of an alerting rule, and what several of them ask of a counter."""

from __future__ import annotations

import re
from typing import Any

Rule = dict[str, Any]

PAGE, TICKET = "page", "ticket"
# Has a section for each alert.
RUNBOOK = "docs/runbook.md"
# A counter with its labels, within an expression.
_COUNTER = re.compile(r"loradock_\w+(?:\{[^}]*\})?")


def changed(counter: str, window: str) -> str:
    """The counter has grown within the window, also when it was born with its first event."""
    increase = _COUNTER.sub(rf"increase(\g<0>[{window}])", counter)
    return f"({increase} > 0 or ({counter} > 0 unless {_ago(counter, window)}))"


def grown(counter: str, window: str) -> str:
    """By how much the counter has grown within the window; all of it, if it is younger."""
    return f"({counter} - {_ago(counter, window)} or {counter})"


def _ago(counter: str, window: str) -> str:
    return _COUNTER.sub(rf"\g<0> offset {window}", counter)


def alert(
    name: str,
    expr: str,
    severity: str,
    summary: str,
    description: str,
    *,
    dashboard: str,
    wait: str | None = None,
    action: str | None = None,
) -> Rule:
    labels = {"severity": severity} | ({"action": action} if action else {})
    rule: Rule = {"alert": name, "expr": expr}
    if wait:
        rule["for"] = wait
    annotations = {"summary": summary, "description": description, "dashboard": f"/d/{dashboard}"}
    annotations["runbook"] = f"{RUNBOOK}#{name.lower()}"
    return {**rule, "labels": labels, "annotations": annotations}
