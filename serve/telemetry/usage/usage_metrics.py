"""Use and cost as series, by adapter and tenant, and how long each engine has computed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from serve.engine.fleet import Fleet
from serve.telemetry.families import Counters, Family, Tally
from serve.telemetry.places import TIDY, Places
from serve.telemetry.usage.usage_ledger import Usage

LABELS = ("adapter", "tenant")
OTHERS = ("other", "other")


class UsageMetrics:
    """At most `limit` pairs of adapter and tenant have series of their own; the rest are `other`.

    `known` says whether an adapter or base of this name exists: what is gone gives its place back.
    """

    def __init__(
        self,
        currency: str,
        known: Callable[[str], bool],
        *,
        limit: int = 100,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._currency = currency
        self._known = known
        self._clock = clock
        self._places = Places[tuple[str, str]](limit, self._forget)
        self._tidied = -TIDY
        self._series: dict[tuple[str, str], tuple[Tally, ...]] = {}
        self._requests = Counters(
            "loradock_usage_requests",
            "Requests that the engine worked on, counted when they end, by adapter and tenant.",
            LABELS,
        )
        self._tokens = Counters(
            "loradock_usage_tokens",
            "Tokens by kind: of prompts as far as they were computed, of prompts from the prefix cache, generated.",
            (*LABELS, "kind"),
        )
        self._seconds = Counters(
            "loradock_usage_engine_seconds",
            "Seconds of the engine's steps, divided among their sequences by the tokens computed.",
            LABELS,
        )
        self._cost = Counters(
            "loradock_usage_cost",
            "Money that requests cost by the prices in the configuration, in the currency of the label.",
            (*LABELS, "currency"),
        )

    @property
    def families(self) -> tuple[Family, ...]:
        return self._requests, self._tokens, self._seconds, self._cost

    def take(self, adapter: str, tenant: str, used: Usage) -> None:
        """Count a request that has ended; the event loop's alone."""
        requests, prompt, cached, generated, seconds, cost = self._series_of(self._pair(adapter, tenant))
        requests.inc(used.requests)
        prompt.inc(used.prompt_tokens - used.cached_tokens)
        cached.inc(used.cached_tokens)
        generated.inc(used.generated_tokens)
        seconds.inc(used.engine_seconds)
        cost.inc(used.cost)

    def _series_of(self, pair: tuple[str, str]) -> tuple[Tally, ...]:
        """Everything that is counted of a pair, looked up once."""
        series = self._series.get(pair)
        if series is None:
            series = self._series[pair] = (
                self._requests.labels(*pair),
                *(self._tokens.labels(*pair, kind) for kind in ("prompt", "cached", "generated")),
                self._seconds.labels(*pair),
                self._cost.labels(*pair, self._currency),
            )
        return series

    def _pair(self, adapter: str, tenant: str) -> tuple[str, str]:
        pair = (adapter, tenant)
        if pair not in self._places and self._places.is_full and self._clock() - self._tidied >= TIDY:
            self._tidy()
        return pair if self._places.take(pair) else OTHERS

    def _tidy(self) -> None:
        self._tidied = self._clock()
        for pair in list(self._places.keys()):
            if not self._known(pair[0]):
                self._places.drop(pair)

    def _forget(self, pair: tuple[str, str]) -> None:
        self._series.pop(pair, None)
        for family in self.families:
            for labels in family.known():
                if labels[:2] == pair:
                    family.remove(*labels)


class EngineBusy(Collector):
    """How long each base's engine has computed: for clients, whose shares add up to it, and for the server itself."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def collect(self) -> Iterator[Metric]:
        busy = CounterMetricFamily(
            "loradock_engine_busy_seconds",
            "Seconds of the engine's steps, for clients and for requests of the server's own (background).",
            labels=("model", "use"),
        )
        for base in self._fleet:
            for use, seconds in base.backend.busy_seconds().items():
                busy.add_metric((base.name, use), seconds)
        yield busy
