"""The last half hour of each adapter version, minute by minute: for the dashboard that needs no Prometheus.

Latencies are kept as counts in the buckets of the SLOs' histograms, so a minute costs the same however much happens.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from serve.asgi.exchange import Exchange
from serve.telemetry.slo import FIRST_TOKEN_SECONDS, INTER_TOKEN_SECONDS

MINUTES = 30
# What happens now is what happened in so many minutes of the clock.
NOW = 3
MAX_VERSIONS = 200


@dataclass(slots=True)
class Minute:
    """What one version did in one minute of the clock."""

    at: int
    requests: int = 0
    errors: int = 0
    # Generated, by requests that ended in it.
    tokens: int = 0
    first: list[int] = field(default_factory=lambda: [0] * (len(FIRST_TOKEN_SECONDS) + 1))
    gap: list[int] = field(default_factory=lambda: [0] * (len(INTER_TOKEN_SECONDS) + 1))

    def described(self) -> dict[str, Any]:
        """For the API. Latencies are upper bounds of buckets, None where nothing was measured."""
        return {
            "at": self.at * 60,
            "requests": self.requests,
            "errors": self.errors,
            "first_token_p50": _quantile(0.5, self.first, FIRST_TOKEN_SECONDS),
            "first_token_p95": _quantile(0.95, self.first, FIRST_TOKEN_SECONDS),
            "inter_token_p95": _quantile(0.95, self.gap, INTER_TOKEN_SECONDS),
        }


class Recent:
    """`take` belongs to the event loop, as `described` does."""

    def __init__(self, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        # When counting began: whatever was before is not in it.
        self.began = clock()
        self._minutes: dict[tuple[str, str], deque[Minute]] = {}

    def take(self, exchange: Exchange) -> None:
        """Count one exchange; what never reached a model is nobody's."""
        if not exchange.version:
            return
        minute = self._minute(exchange.adapter, exchange.version)
        minute.requests += 1
        minute.errors += exchange.status >= 500 or exchange.failure is not None
        minute.tokens += exchange.generated_tokens
        if exchange.first is not None and exchange.status == 200:
            minute.first[bisect_left(FIRST_TOKEN_SECONDS, exchange.first)] += 1
        if (gap := exchange.gap) is not None:
            minute.gap[bisect_left(INTER_TOKEN_SECONDS, gap)] += 1

    def described(self, adapter: str, version: str) -> list[dict[str, Any]]:
        """The minutes in which the version was asked, oldest first."""
        oldest = int(self._clock() // 60) - MINUTES
        minutes = self._minutes.get((adapter, version), ())
        return [minute.described() for minute in minutes if minute.at > oldest]

    def totals(self) -> dict[tuple[str, str], tuple[int, int]]:
        """Requests and failures of each adapter and version that was asked, in the last `MINUTES`."""
        oldest, totals = int(self._clock() // 60) - MINUTES, {}
        for key, minutes in self._minutes.items():
            kept = [minute for minute in minutes if minute.at > oldest]
            if kept:
                totals[key] = sum(minute.requests for minute in kept), sum(minute.errors for minute in kept)
        return totals

    def now(self, counts: Callable[[str], bool]) -> dict[str, Any]:
        """How much is asked now, of the adapters that count: rates over the last `NOW` minutes of the clock, or since
        counting began; failures and the first token of the last `MINUTES`."""
        clock = self._clock()
        last = int(clock // 60)
        since = max((last - NOW + 1) * 60.0, self.began)
        minutes = [
            minute
            for (adapter, _), each in self._minutes.items()
            if counts(adapter)
            for minute in each
            if minute.at > last - MINUTES
        ]
        lately = [minute for minute in minutes if minute.at > last - NOW]
        seconds = max(clock - since, 1.0)
        first = [sum(counts) for counts in zip(*(minute.first for minute in minutes), strict=True)]
        return {
            "requests_per_second": round(sum(minute.requests for minute in lately) / seconds, 3),
            "tokens_per_second": round(sum(minute.tokens for minute in lately) / seconds, 1),
            "requests": sum(minute.requests for minute in minutes),
            "errors": sum(minute.errors for minute in minutes),
            "first_token_p95": _quantile(0.95, first, FIRST_TOKEN_SECONDS),
        }

    def columns(self, adapter: str, version: str) -> dict[str, Any] | None:
        """The last `MINUTES` as one list a number, the current minute last, and the same of all together.

        None for a version that was not asked. `from` is when the first minute began, in seconds since 1970; latencies
        are upper bounds of buckets, in seconds, None where nothing was measured. `answers` is how many first tokens
        the quantiles of `all` are of.
        """
        first = int(self._clock() // 60) - MINUTES + 1
        minutes = {minute.at: minute for minute in self._minutes.get((adapter, version), ()) if minute.at >= first}
        if not minutes:
            return None
        empty = Minute(0)
        row = [minutes.get(at, empty) for at in range(first, first + MINUTES)]
        answers, gaps = ([sum(counts) for counts in zip(*each, strict=True)] for each in (
            (minute.first for minute in row), (minute.gap for minute in row)
        ))  # fmt: skip
        return {
            "from": first * 60,
            "requests": [minute.requests for minute in row],
            "errors": [minute.errors for minute in row],
            "first_token_p50": [_quantile(0.5, minute.first, FIRST_TOKEN_SECONDS) for minute in row],
            "first_token_p95": [_quantile(0.95, minute.first, FIRST_TOKEN_SECONDS) for minute in row],
            "all": {
                "requests": sum(minute.requests for minute in row),
                "errors": sum(minute.errors for minute in row),
                "answers": sum(answers),
                "first_token_p50": _quantile(0.5, answers, FIRST_TOKEN_SECONDS),
                "first_token_p95": _quantile(0.95, answers, FIRST_TOKEN_SECONDS),
                "inter_token_p95": _quantile(0.95, gaps, INTER_TOKEN_SECONDS),
            },
        }

    def _minute(self, adapter: str, version: str) -> Minute:
        now = int(self._clock() // 60)
        minutes = self._minutes.get((adapter, version))
        if minutes is None:
            self._make_room()
            minutes = self._minutes[adapter, version] = deque(maxlen=MINUTES)
        if not minutes or minutes[-1].at != now:
            minutes.append(Minute(now))
        return minutes[-1]

    def _make_room(self) -> None:
        """Who has been silent for longest goes, where more versions are asked than are kept."""
        if len(self._minutes) >= MAX_VERSIONS:
            silent = min(self._minutes, key=lambda version: self._minutes[version][-1].at)
            del self._minutes[silent]


def _quantile(q: float, counts: Sequence[int], bounds: Sequence[float]) -> float | None:
    """The bound below which a part `q` lies; the last bound for what lies beyond all of them."""
    total = sum(counts)
    if not total:
        return None
    seen = 0
    for at, count in enumerate(counts):
        seen += count
        if seen >= q * total:
            return bounds[min(at, len(bounds) - 1)]
    return bounds[-1]
