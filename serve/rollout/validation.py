"""What a version did to its base, as `loradock optimize` measured it, and whether its adapter's policy is content.

The report is made beside a fine-tuning job or when somebody asks for it; what is kept of it stands with the version's
checks.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta

KEPT = "validation"
# A policy names checks; this one stands for whatever was measured.
ALL = "all"
CHECKS = ("questions", "text", "refusals", "over_refusals", "calibration", "task", "leaks")
PASSED = "passed"
SHOWN = 8  # lost questions
REPORT_BYTES = 1 << 18
_Text = Annotated[str, Meta(max_length=2000)]


class Check(msgspec.Struct, frozen=True):
    """What was measured, where it lies for all cases like these, and the most that it may be."""

    name: Annotated[str, Meta(max_length=40)]
    measured: float
    low: float
    high: float
    limit: float
    cases: int
    verdict: Annotated[str, Meta(max_length=40)]
    what: _Text = ""


class Lost(msgspec.Struct, frozen=True):
    """A question that the base answers rightly, and what the adapter says."""

    question: _Text
    says: _Text
    answer: _Text


class Leak(msgspec.Struct, frozen=True):
    row: int
    tokens: int


class Report(msgspec.Struct, frozen=True):
    """The program's own report; what it says beside is for people."""

    verdict: Annotated[str, Meta(max_length=40)]
    checks: Annotated[list[Check], Meta(max_length=40)] = []
    lost: Annotated[list[Lost], Meta(max_length=100)] = []
    leaked: Annotated[list[Leak], Meta(max_length=10_000)] = []
    problem: _Text = ""

    def kept(self) -> dict[str, Any]:
        """What stays with the version."""
        checks = {check.name: msgspec.to_builtins(check) for check in self.checks}
        lost = [f"{each.question} {each.says}, not {each.answer}" for each in self.lost]
        told = {"lost": lost[:SHOWN], "leaked": len(self.leaked), "problem": self.problem}
        return {
            KEPT: {
                "verdict": self.verdict,
                "when": round(time.time()),
                "checks": checks,
                **{name: value for name, value in told.items() if value},
            }
        }


def read(document: bytes) -> Report | None:
    """The report that the program wrote; None for what is none."""
    try:
        return msgspec.json.decode(document, type=Report) if len(document) <= REPORT_BYTES else None
    except (msgspec.DecodeError, RecursionError):
        return None


def problem(checks: Mapping[str, Any], wanted: Sequence[str]) -> str:
    """Why a version with these checks is held back by a policy that wants so much; "" if it is not."""
    if not wanted:
        return ""
    report = checks.get(KEPT)
    if not report:
        return "has no validation report"
    measured = report["checks"]
    names = [*measured] if ALL in wanted else wanted
    said = [_problem(name, measured.get(name)) for name in names] or ["nothing was measured"]
    bad = "; ".join(filter(None, said))
    return f"is not validated: {bad}" if bad else ""


def _problem(name: str, check: Mapping[str, Any] | None) -> str:
    if check is None:
        return f"{name} was not measured"
    if check["verdict"] == PASSED:
        return ""
    interval = f"{check['low']:.3g} to {check['high']:.3g}"
    return f"{name} {check['verdict']}, {check['measured']:.3g} ({interval}), at most {check['limit']:g}"
