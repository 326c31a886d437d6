"""Our own families of series, and those of one adapter version."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from serve.asgi.exchange import Failure
from serve.telemetry.families import Counters, Family, Histograms, Tally
from serve.telemetry.slo import FIRST_TOKEN_SECONDS, INTER_TOKEN_SECONDS

LABELS = ("adapter", "version")
OTHER = ("other", "")
# How requests end, by status and finish reason: counted from 0 for every version, and for what reached none.
ENDS = (("200", "stop"), ("200", "length"), ("429", ""), ("500", ""), ("503", ""), ("504", ""))
UNROUTED_ENDS = (("400", ""), ("401", ""), ("404", ""), ("429", ""))
WORST_GAP_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
TOTAL_SECONDS = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
QUEUE_SECONDS = (0.005, 0.025, 0.1, 0.5, 1, 5, 10, 30, 60)
ENGINE_QUEUE_SECONDS = (0.005, 0.05, 0.5, 5, 30)
LOAD_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
TAP_SECONDS = (0.00001, 0.00002, 0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.005, 0.025)


class OwnFamilies:
    """Every `loradock_*` family that is counted as it happens; what is read at a scrape is in `live_state`."""

    def __init__(self, loads: AdapterLoads, more: Sequence[Family] = ()) -> None:
        self._all: list[Family] = [*more]
        self._of_requests()
        self._of_latencies()
        self._all.append(loads)
        self.swaps = self._counter(
            "adapter_swaps",
            "Changes of an adapter's live version through this server, by result: promoted or rolled_back.",
            "adapter",
            "result",
        )
        self.rollbacks = self._counter(
            "rollbacks",
            "Versions, live or canary, that the server itself took the traffic from, by reason. A series stays as long "
            "as the adapter is registered.",
            *LABELS,
            "reason",
        )
        self.adapter_rollbacks = self._counter(
            "adapter_rollbacks",
            "Times that the server itself took the traffic from a version of the adapter; 0 from the start.",
            "adapter",
        )
        self.shadows = self._counter(
            "shadow_requests",
            "Requests that a shadow was to answer too: answered, failed, or dropped because others were under way.",
            *LABELS,
            "result",
        )
        self.tap = self._histogram(
            "tap", "Seconds that looking at one request took of the event loop, after it had ended.", TAP_SECONDS, ()
        )
        self.feedback = self._counter(
            "feedback", "Answers that somebody rated, by rating: good (0.5 or more of 1) or bad.", *LABELS, "rating"
        )

    def _of_requests(self) -> None:
        self.requests = self._counter(
            "requests",
            "Requests, counted when they end, by the version that answered or was to answer, the HTTP status (499: the "
            "client left first), and how the engine ended the text.",
            *LABELS,
            "code",
            "finish_reason",
        )
        self.failures = self._counter(
            "requests_failed",
            "Requests that the server did not answer or broke off, counted when they end, by reason: overloaded (429), "
            "unavailable (503), queue_deadline and deadline (the client's own, before and after the engine began), "
            "error (any other 5xx, and an answer that broke off).",
            *LABELS,
            "reason",
        )
        self.prompt = self._counter(
            "prompt_tokens",
            "Tokens of prompts that went to the engine, counted when the request ends; a prompt with several answers "
            "counts once.",
            *LABELS,
        )
        self.generated = self._counter(
            "generation_tokens",
            "Tokens that the engine generated, counted when the request ends, whether or not the client got them.",
            *LABELS,
        )
        self.drafts = self._counter(
            "draft_tokens",
            "Tokens that were computed ahead of their turn (setting speculation), by result: accepted (they are among "
            "the generated ones) or rejected. Counted when the request ends; not of those whose client left first.",
            *LABELS,
            "result",
        )

    def _of_latencies(self) -> None:
        self.first = self._histogram(
            "time_to_first_token",
            "Seconds from a request's arrival to its first token, with all waiting; of requests answered with 200, "
            "counted when they end.",
            FIRST_TOKEN_SECONDS,
        )
        self.gap = self._histogram(
            "inter_token_latency",
            "Seconds that a request waited for a token after its first, on average; counted once a request, when it "
            "ends.",
            INTER_TOKEN_SECONDS,
        )
        self.worst = self._histogram(
            "max_inter_token_latency",
            "Seconds that a request waited at most for a token after its first; counted once a request, when it ends.",
            WORST_GAP_SECONDS,
        )
        self.total = self._histogram(
            "request_duration",
            "Seconds from a request's arrival to its last byte; of requests answered with 200, counted when they end.",
            TOTAL_SECONDS,
        )
        self.queue = self._histogram(
            "queue_time",
            "Seconds that a request waited in the server's own queue for its seat, or until its client gave up or its "
            "deadline passed; counted when the request ends. What is refused at once (429) is not in it.",
            QUEUE_SECONDS,
        )
        self.engine_queue = self._histogram(
            "engine_queue",
            "Seconds from the engine's taking a request to its computing on it, in the engine's own queue; counted "
            "when the request ends.",
            ENGINE_QUEUE_SECONDS,
        )

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
        help = "Seconds to bring an adapter into the engine, by where its weights came from; counted when it is there."
        super().__init__("loradock_adapter_load_seconds", help, ("tier",), LOAD_SECONDS)
        self.labels("disk")  # 0 from the start

    def observe(self, tier: str, seconds: float) -> None:
        self.labels(tier).observe(seconds)


class Series:
    """Everything that is counted of one version, looked up once; all that matters is there from the start, at 0."""

    def __init__(self, families: OwnFamilies, labels: tuple[str, str]) -> None:
        self.seen = 0.0
        self._labels = labels
        self._owned: dict[tuple[Family, tuple[str, ...]], Any] = {}
        self._requests, self._failures = families.requests, families.failures
        self.prompt = self.child(families.prompt)
        self.generated = self.child(families.generated)
        self.accepted = self.child(families.drafts, "accepted")
        self.rejected = self.child(families.drafts, "rejected")
        self.first = self.child(families.first)
        self.gap = self.child(families.gap)
        self.worst = self.child(families.worst)
        self.total = self.child(families.total)
        self.queue = self.child(families.queue)
        self.engine_queue = self.child(families.engine_queue)
        for code, finish_reason in UNROUTED_ENDS if labels == OTHER else ENDS:
            self.requests(code, finish_reason)
        for failure in Failure:
            self.failures(failure)
        for rating in ("good", "bad"):
            self.child(families.feedback, rating)

    def see(self, now: float) -> None:
        """Somebody needs it."""
        self.seen = now

    def requests(self, code: str, finish_reason: str) -> Tally:
        counted: Tally = self.child(self._requests, code, finish_reason)
        return counted

    def failures(self, reason: str) -> Tally:
        counted: Tally = self.child(self._failures, reason)
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
