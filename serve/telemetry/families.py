"""Counters and histograms with a series for each of many versions, in Prometheus's text formats.

prometheus_client makes an object of every sample at every scrape: 100 versions with 75 series each took it 0.2 s of the
interpreter's lock, in which no token moves. Here a series' text up to its number is made once, and a scrape joins.

One thread counts; another may render meanwhile and sees each series before or after a count.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

Child = TypeVar("Child", "Tally", "Buckets")
# Of a request: its id, its trace's, the value, and when.
Exemplar = tuple[str, str, float, float]


class Tally:
    """A number that grows."""

    __slots__ = ("_prefix", "value")

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self.value = 0.0

    def inc(self, amount: float = 1.0) -> None:
        self.value += amount

    def lines(self, openmetrics: bool) -> Iterator[str]:
        yield f"{self._prefix}{self.value}\n"


class Buckets:
    """How often what was observed; of each bucket, the last request that fell into it."""

    __slots__ = ("_bounds", "_counts", "_exemplars", "_prefixes", "_sum")

    def __init__(self, bounds: Sequence[float], prefixes: Sequence[str]) -> None:
        self._bounds = bounds
        self._prefixes = prefixes
        self._counts = [0] * (len(bounds) + 1)
        self._exemplars: list[Exemplar | None] = [None] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, request_id: str = "", trace_id: str = "") -> None:
        """The ids become an exemplar: of the request, and of the trace that its client began, if it did."""
        bucket = bisect_left(self._bounds, value)
        self._counts[bucket] += 1
        self._sum += value
        if request_id:
            self._exemplars[bucket] = (request_id, trace_id, value, time.time())

    def lines(self, openmetrics: bool) -> Iterator[str]:
        total = 0
        counts, prefixes = list(self._counts), self._prefixes
        for bucket, count in enumerate(counts):
            total += count
            exemplar = self._exemplars[bucket] if openmetrics else None
            yield f"{prefixes[bucket]}{total}.0{_exemplary(exemplar) if exemplar else ''}\n"
        yield f"{prefixes[-2]}{total}.0\n"
        yield f"{prefixes[-1]}{self._sum}\n"


class Family(Generic[Child]):
    """All series of one name."""

    kind = ""

    def __init__(self, name: str, help: str, labels: Sequence[str]) -> None:
        self.name = name
        self._help = help
        self._labels = tuple(labels)
        self._children: dict[tuple[str, ...], Child] = {}
        if not labels:
            self.labels()

    def labels(self, *values: str) -> Child:
        """The series with these label values, begun now if need be."""
        child = self._children.get(values)
        if child is None:
            if len(values) != len(self._labels):
                raise ValueError(f"{self.name} has the labels {self._labels}, not the values {values}")
            child = self._children[values] = self._made(dict(zip(self._labels, values, strict=True)))
        return child

    def remove(self, *values: str) -> None:
        """Out of the scrape."""
        self._children.pop(values, None)

    def known(self) -> list[tuple[str, ...]]:
        """The label values of every series."""
        return list(self._children)

    def render(self, openmetrics: bool) -> str:
        """This family in the text format, or in OpenMetrics with exemplars."""
        name = self._exposed(openmetrics)
        lines = [f"# HELP {name} {self._help}\n", f"# TYPE {name} {self.kind}\n"]
        for child in list(self._children.values()):
            lines += child.lines(openmetrics)
        return "".join(lines)

    def _exposed(self, openmetrics: bool) -> str:
        return self.name

    def _made(self, labels: dict[str, str]) -> Child:
        raise NotImplementedError


class Counters(Family[Tally]):
    """`name` comes without its _total."""

    kind = "counter"

    def _exposed(self, openmetrics: bool) -> str:
        return self.name if openmetrics else f"{self.name}_total"

    def _made(self, labels: dict[str, str]) -> Tally:
        return Tally(f"{self.name}_total{_spelled(labels)} ")


class Histograms(Family[Buckets]):
    kind = "histogram"

    def __init__(self, name: str, help: str, labels: Sequence[str], bounds: Sequence[float]) -> None:
        self.bounds = tuple(float(bound) for bound in bounds)
        super().__init__(name, help, labels)

    def _made(self, labels: dict[str, str]) -> Buckets:
        bounds = [*map(repr, self.bounds), "+Inf"]
        prefixes = [f"{self.name}_bucket{_spelled({**labels, 'le': bound})} " for bound in bounds]
        ends = [f"{self.name}_{end}{_spelled(labels)} " for end in ("count", "sum")]
        return Buckets(self.bounds, [*prefixes, *ends])


def _exemplary(exemplar: Exemplar) -> str:
    request_id, trace_id, value, when = exemplar
    labels = f'request_id="{request_id}"' + (f',trace_id="{trace_id}"' if trace_id else "")
    return f" # {{{labels}}} {value:.6g} {when:.3f}"


def _spelled(labels: dict[str, str]) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in sorted(labels.items())) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
