"""Our own families of series, and those of one adapter version."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from serve.telemetry.families import Counters, Family, Histograms, Tally
from serve.telemetry.slo import FIRST_TOKEN_SECONDS, INTER_TOKEN_SECONDS

LABELS = ("adapter", "version")
WORST_GAP_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
TOTAL_SECONDS = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
QUEUE_SECONDS = (0.005, 0.025, 0.1, 0.5, 1, 5, 30)
LOAD_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
TAP_SECONDS = (0.00001, 0.00002, 0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.005, 0.025)


class OwnFamilies:
    """Every `loradock_*` family that is counted as it happens; what is read at a scrape is in `metrics`."""

    def __init__(self, loads: AdapterLoads, more: Sequence[Family] = ()) -> None:
        self._all: list[Family] = [*more]
        self.requests = self._counter(
            "requests",
            "Requests by the version that answered, the HTTP status, and how the engine ended the text.",
            *LABELS,
            "code",
            "finish_reason",
        )
        self.prompt = self._counter("prompt_tokens", "Tokens of prompts.", *LABELS)
        self.generated = self._counter("generation_tokens", "Tokens generated.", *LABELS)
        self.first = self._histogram(
            "time_to_first_token", "From the request's arrival to its first token.", FIRST_TOKEN_SECONDS
        )
        self.gap = self._histogram(
            "inter_token_latency", "A request's mean wait for a token after its first.", INTER_TOKEN_SECONDS
        )
        self.worst = self._histogram(
            "max_inter_token_latency", "A request's longest wait for a token after its first.", WORST_GAP_SECONDS
        )
        self.total = self._histogram("request_duration", "From the request's arrival to its last byte.", TOTAL_SECONDS)
        self.queue = self._histogram(
            "queue_time", "From the engine's taking a request to its computing on it.", QUEUE_SECONDS
        )
        self.swaps = self._counter("adapter_swaps", "Changes of an adapter's live version.", "adapter", "result")
        self._all.append(loads)
        self.rollbacks = self._counter(
            "rollbacks", "Versions that the server itself took the traffic from.", *LABELS, "reason"
        )
        self.shadows = self._counter(
            "shadow_requests",
            "Requests that a shadow was to answer too: answered, failed, or dropped because others were under way.",
            *LABELS,
            "result",
        )
        self.tap = self._histogram("tap", "What watching an answer took of the event loop.", TAP_SECONDS, ())
        self.feedback = self._counter("feedback", "Answers that somebody rated.", *LABELS, "rating")

    def render(self, openmetrics: bool) -> str:
        """All of them in a text format of Prometheus."""
        return "".join(family.render(openmetrics) for family in self._all)

    def _counter(self, name: str, help: str, *labels: str) -> Counters:
        made = Counters(f"loradock_{name}", help, labels)
        self._all.append(made)
        return made

    def _histogram(self, name: str, help: str, bounds: Sequence[float], labels: Sequence[str] = LABELS) -> Histograms:
        made = Histograms(f"loradock_{name}_seconds", help, labels, bounds)
        self._all.append(made)
        return made


class AdapterLoads(Histograms):
    """How long it took to bring adapters into an engine, by where they came from."""

    def __init__(self) -> None:
        help = "Bringing an adapter into the engine."
        super().__init__("loradock_adapter_load_seconds", help, ("tier",), LOAD_SECONDS)

    def observe(self, tier: str, seconds: float) -> None:
        self.labels(tier).observe(seconds)


class Series:
    """Everything that is counted of one version, looked up once."""

    def __init__(self, families: OwnFamilies, labels: tuple[str, str]) -> None:
        self.seen = 0.0
        self._labels = labels
        self._owned: dict[tuple[Family, tuple[str, ...]], Any] = {}
        self._counter = families.requests
        self.prompt = self.child(families.prompt)
        self.generated = self.child(families.generated)
        self.first = self.child(families.first)
        self.gap = self.child(families.gap)
        self.worst = self.child(families.worst)
        self.total = self.child(families.total)
        self.queue = self.child(families.queue)

    def requests(self, code: str, finish_reason: str) -> Tally:
        counted: Tally = self.child(self._counter, code, finish_reason)
        return counted

    def child(self, metric: Family, *more: str) -> Any:
        """This version's part of `metric`."""
        owned = self._owned.get((metric, more))
        if owned is None:
            owned = self._owned[metric, more] = metric.labels(*self._labels, *more)
        return owned

    def remove(self) -> None:
        """Out of the scrape, all of it."""
        for metric, more in self._owned:
            metric.remove(*self._labels, *more)
