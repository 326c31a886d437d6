"""The dashboards: is it healthy, which adapter, has it drifted, is the new version better, are the answers good,
is the engine full, who uses how much, how do batches and guards do.

One module each; what they share is in `queries`. They know the names of metrics and nothing of a running server.
"""

from __future__ import annotations

from collections.abc import Sequence

from serve.telemetry.rendered.dashboards import adapters, batches, drift, engine, overview, quality, swap, usage
from serve.telemetry.rendered.panels import Json
from serve.telemetry.slo import Slo


def dashboards(slos: Sequence[Slo]) -> list[Json]:
    """Every dashboard, as Grafana's JSON; the SLOs give some panels their red lines."""
    of_slos = [overview.board(slos), adapters.board(slos)]
    rest = (drift, swap, quality, engine, usage, batches)
    return [*of_slos, *(module.board() for module in rest)]
