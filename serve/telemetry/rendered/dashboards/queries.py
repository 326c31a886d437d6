"""What several dashboards share: variables, limits, annotations, and PromQL expressions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from serve.telemetry.rendered.alerts import changed
from serve.telemetry.rendered.panels import Annotation, Panel, Query, Variable
from serve.telemetry.rendered.rules import failed, judged
from serve.telemetry.slo import EVERY, Objective, Slo

INTERVAL = "[$__rate_interval]"
CHOSEN = 'adapter=~"$adapter",version=~"$version"'
ADAPTER = Variable("adapter", "Adapter", "label_values(loradock_requests_total, adapter)")
VERSION = Variable("version", "Version", 'label_values(loradock_requests_total{adapter=~"$adapter"}, version)')
ENGINE = Variable("model", "Base model", "label_values(loradock_engine_phase, model)")

Levels = Sequence[tuple[float | None, str]]

LATE: Levels = ((None, "green"), (0.5, "orange"), (1, "red"))
BUDGET: Levels = ((None, "red"), (0.1, "orange"), (0.5, "green"))


def marks(adapter: str) -> list[Annotation]:
    which = f'adapter=~"{adapter}"'
    swaps = f"sum by (adapter, result) (loradock_adapter_swaps_total{{{which}}})"
    rollbacks = f"sum by (adapter, version, reason) (loradock_rollbacks_total{{{which}}})"
    return [
        Annotation("Swaps", changed(swaps, "2m"), "{{adapter}} {{result}}", "blue"),
        Annotation("Rollbacks", changed(rollbacks, "2m"), "{{adapter}}@{{version}} rolled back: {{reason}}", "red"),
    ]


def rate(metric: str, labels: str, by: str = "") -> str:
    summed = f"sum by ({by})" if by else "sum"
    return f"{summed} (rate({metric}{{{labels}}}{INTERVAL}))"


def ratio(part: str, whole: str) -> str:
    """How much of one counter there is to one of another."""
    return f"sum(rate({part}{INTERVAL})) / sum(rate({whole}{INTERVAL}))"


def quantile(q: float, metric: str, labels: str = "", by: str = "") -> str:
    le = f"le, {by}" if by else "le"
    return f"histogram_quantile({q:g}, sum by ({le}) (rate(loradock_{metric}_bucket{{{labels}}}{INTERVAL})))"


def quantiles(metric: str, labels: str = "", *, exemplars: bool = False) -> list[Query]:
    """The median and the tail; `exemplars` stand on the 95 % line."""
    return [
        Query(quantile(q, metric, labels), f"p{q * 100:g}", exemplars=exemplars and q == 0.95)
        for q in (0.5, 0.95, 0.99)
    ]


def error_ratio(labels: str = "", by: str = "") -> str:
    """The part of the requests that the server failed."""
    return f"{failed('rate', INTERVAL, labels, by)} / {judged('rate', INTERVAL, labels, by)}"


def counted(metric: str, labels: str, window: str, by: str) -> str:
    """How often within the window, as a whole number, with what a series that is younger was born with.

    Prometheus takes the first sample of a series for no growth, and extrapolates the rest.
    """
    which, summed = f"{metric}{{{labels}}}", f"sum by ({by})"
    growth = f"{summed} (increase({which}[{window}]))"
    born = f"{summed} (min_over_time({which}[{window}])) unless {summed} ({which} offset {window})"
    return f"round({growth} + ({born} or 0 * {growth}))"


def failures(labels: str, by: str) -> str:
    """Requests a second that the server failed, by reason."""
    return rate("loradock_requests_failed_total", labels, f"{by}, reason")


def figure(title: str, says: str, queries: Sequence[Query], **more: Any) -> Panel:
    """One large number."""
    return Panel(title, says, queries, kind="stat", width=4, height=4, **more)


def limit(slos: Sequence[Slo], objective: Objective) -> Levels:
    """Green below what the SLO of every adapter allows, red above."""
    for slo in slos:
        if slo.adapter == EVERY and slo.objective is objective and slo.target:
            return ((None, "green"), (slo.threshold or slo.budget, "red"))
    return ((None, "green"),)
