"""Panels and dashboards as values, and how Grafana 11 and 12 spell them.

Plain dictionaries: nothing but this package is needed to render. The tests read every dashboard with Grafana's own
schema (grafana-foundation-sdk), which knows each field that may stand here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]

DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
TAG = "loradock"
COLUMNS = 24
# The end of a description whose panel has nothing to show on a good day.
MAY_BE_ZERO = "Empty or zero while nothing of the kind happens."
# Units that Grafana has no name for.
TOKENS, TOKENS_PER_SECOND = "suffix: tokens", "suffix: tokens/s"


@dataclass(frozen=True, slots=True)
class Query:
    """PromQL and what its series are called; `now` asks for the latest value alone."""

    expr: str
    legend: str = ""
    now: bool = False
    exemplars: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """`levels` are (value, color), rising; the first color holds below the first value. `nothing` is shown in the
    place of "No data"."""

    title: str
    says: str
    queries: Sequence[Query]
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 12
    height: int = 8
    quiet: bool = False
    levels: Sequence[tuple[float | None, str]] = ((None, "green"),)
    line: bool = False
    mappings: dict[str, tuple[str, str]] = field(default_factory=dict)
    least: float | None = 0
    most: float | None = None
    decimals: int | None = None
    nothing: str = ""

    def json(self, id: int, x: int, y: int) -> Json:
        """The panel at its place."""
        return {
            "id": id,
            "type": self.kind,
            "title": self.title,
            "description": f"{self.says} {MAY_BE_ZERO}" if self.quiet else self.says,
            "datasource": DATASOURCE,
            "gridPos": {"x": x, "y": y, "w": self.width, "h": self.height},
            "targets": [_target(query, chr(ord("A") + at), self.kind) for at, query in enumerate(self.queries)],
            "fieldConfig": {"defaults": self._defaults(), "overrides": []},
            "options": _OPTIONS[self.kind],
        } | ({"transformations": _TABLE} if self.kind == "table" else {})

    def _defaults(self) -> Json:
        steps = [{"value": value, "color": color} for value, color in self.levels]
        defaults: Json = {"unit": self.unit, "thresholds": {"mode": "absolute", "steps": steps}}
        if self.least is not None and self.kind != "heatmap":
            defaults["min"] = self.least
        if self.most is not None:
            defaults["max"] = self.most
        if self.decimals is not None:
            defaults["decimals"] = self.decimals
        if self.nothing:
            defaults["noValue"] = self.nothing
        if self.mappings:
            options = {value: {"text": text, "color": color} for value, (text, color) in self.mappings.items()}
            defaults["mappings"] = [{"type": "value", "options": options}]
        if self.kind == "timeseries":
            defaults["custom"] = {
                "lineWidth": 1,
                "fillOpacity": 8,
                "showPoints": "never",
                "spanNulls": False,
                "thresholdsStyle": {"mode": "line" if self.line else "off"},
            }
        elif self.kind == "heatmap":
            defaults["custom"] = {"scaleDistribution": {"type": "linear"}}
        elif self.kind == "state-timeline":
            defaults["custom"] = {"lineWidth": 0, "fillOpacity": 80}
        if self.kind in ("stat", "bargauge", "state-timeline"):
            defaults["color"] = {"mode": "thresholds"}
        return defaults


@dataclass(frozen=True, slots=True)
class Row:
    """A heading over the panels that follow."""

    title: str

    def json(self, id: int, y: int) -> Json:
        place = {"x": 0, "y": y, "w": COLUMNS, "h": 1}
        return {"id": id, "type": "row", "title": self.title, "collapsed": False, "gridPos": place, "panels": []}


@dataclass(frozen=True, slots=True)
class Variable:
    """A choice at the top of the dashboard, from a label's values."""

    name: str
    label: str
    query: str
    many: bool = True

    def json(self) -> Json:
        every = {"text": ["All"], "value": ["$__all"]}
        return {
            "type": "query",
            "name": self.name,
            "label": self.label,
            "datasource": DATASOURCE,
            "query": {"query": self.query, "refId": self.name},
            "refresh": 2,
            "sort": 3,
            "multi": self.many,
            "includeAll": self.many,
            "hide": 0,
            "options": [],
            "skipUrlSync": False,
        } | ({"allValue": ".*", "current": every} if self.many else {})


@dataclass(frozen=True, slots=True)
class Annotation:
    """Marks on every panel's time axis."""

    name: str
    expr: str
    title: str
    color: str

    def json(self) -> Json:
        return {
            "name": self.name,
            "enable": True,
            "hide": False,
            "iconColor": self.color,
            "datasource": DATASOURCE,
            "expr": self.expr,
            "titleFormat": self.title,
            "step": "60s",
            "useValueForTime": False,
        }


def dashboard(
    uid: str,
    title: str,
    says: str,
    content: Sequence[Panel | Row],
    variables: Sequence[Variable] = (),
    annotations: Sequence[Annotation] = (),
) -> Json:
    """A dashboard whose panels flow from left to right and then down, as words do."""
    source = {
        "type": "datasource",
        "name": "datasource",
        "label": "Data source",
        "query": "prometheus",
        "refresh": 1,
        "regex": "",
        "multi": False,
        "includeAll": False,
        "hide": 0,
        "options": [],
        "skipUrlSync": False,
        # Grafana's default data source, or the first of Prometheus's kind: no uid of somebody's installation.
        "current": {"text": "default", "value": "default"},
    }
    return {
        "uid": f"loradock-{uid}",
        "title": f"loradock / {title}",
        "description": says,
        "tags": [TAG],
        # Grafana 11.0's; later ones bring it up to theirs.
        "schemaVersion": 39,
        "editable": False,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": [source, *(variable.json() for variable in variables)]},
        "annotations": {"list": [annotation.json() for annotation in annotations]},
        "links": [
            {
                "type": "dashboards",
                "title": "loradock",
                "tags": [TAG],
                "asDropdown": False,
                "includeVars": True,
                "keepTime": True,
                "targetBlank": False,
                "icon": "external link",
                "tooltip": "",
                "url": "",
            }
        ],
        "panels": _placed(content),
    }


def _placed(content: Sequence[Panel | Row]) -> list[Json]:
    placed: list[Json] = []
    x = y = tallest = 0
    for id, one in enumerate(content, 1):
        wide = COLUMNS if isinstance(one, Row) else one.width
        if x + wide > COLUMNS:
            x = 0
            y = y + tallest
            tallest = 0
        if isinstance(one, Row):
            placed.append(one.json(id, y))
            tallest = 1
        else:
            placed.append(one.json(id, x, y))
            tallest = max(tallest, one.height)
        x += wide
    return placed


def _target(query: Query, ref: str, kind: str) -> Json:
    return {
        "refId": ref,
        "datasource": DATASOURCE,
        "expr": query.expr,
        "legendFormat": query.legend or "__auto",
        "instant": query.now,
        "range": not query.now,
        "exemplar": query.exemplars,
        "format": {"table": "table", "heatmap": "heatmap"}.get(kind, "time_series"),
    }


_REDUCE = {"calcs": ["lastNotNull"], "fields": "", "values": False}
_LEGEND = {"displayMode": "table", "placement": "bottom", "showLegend": True, "calcs": ["lastNotNull", "max"]}
_TOOLTIP = {"mode": "multi", "sort": "desc"}
_OPTIONS: dict[str, Json] = {
    "timeseries": {"legend": _LEGEND, "tooltip": _TOOLTIP},
    "stat": {
        "reduceOptions": _REDUCE,
        "orientation": "auto",
        "textMode": "auto",
        "colorMode": "background",
        "graphMode": "area",
        "justifyMode": "auto",
    },
    "bargauge": {
        "reduceOptions": _REDUCE,
        "orientation": "horizontal",
        "displayMode": "basic",
        "showUnfilled": True,
        "valueMode": "color",
        "namePlacement": "left",
    },
    "state-timeline": {
        "mergeValues": True,
        "showValue": "never",
        "alignValue": "left",
        "rowHeight": 0.9,
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "single", "sort": "none"},
    },
    "table": {"showHeader": True, "cellHeight": "sm"},
    # The series are a histogram's buckets already; how wide a bucket is, `le` says.
    "heatmap": {
        "calculate": False,
        "cellGap": 1,
        "color": {
            "mode": "scheme",
            "scheme": "Oranges",
            "fill": "dark-orange",
            "steps": 64,
            "exponent": 0.5,
            "reverse": False,
            "scale": "exponential",
        },
        "filterValues": {"le": 1e-9},
        "legend": {"show": True},
        "rowsFrame": {"layout": "auto"},
        "showValue": "never",
        "tooltip": {"mode": "single", "yHistogram": False, "showColorScale": True},
        "yAxis": {"axisPlacement": "left", "reverse": False},
    },
}
# What Prometheus says of itself is of no interest beside its labels.
_TABLE = [{"id": "organize", "options": {"excludeByName": {"Time": True, "__name__": True, "job": True}}}]
