"""Whether a newcomer is let into a line: not, if it would wait longer there than anybody should.

How long it would wait follows from how long seats were held lately, and from how far such forecasts were off.
"""

from __future__ import annotations

import math

from serve.engine.fair_queue import FairQueue
from serve.errors import Overloaded

# How much the latest observation counts.
WEIGHT = 0.1
# A forecast is never corrected by more than this factor.
MOST = 4.0


class Admission:
    """The door of one line; `max_wait` in seconds."""

    def __init__(self, line: FairQueue, max_wait: float) -> None:
        self._line = line
        self._max_wait = max_wait
        self._held = 0.0
        self._off = 1.0

    def forecast(self, tenant: str, priority: int) -> float:
        """Seconds that one more request of the tenant would wait for a seat, by how long seats were held lately alone.

        What such forecasts were off by is learned from this one: learned from the corrected one, whose truth comes out
        a whole wait later, it would overshoot from one extreme to the other.
        """
        line = self._line
        if line.busy < line.seats and not (line.waiting and line.sits(tenant)):
            return 0.0
        # The line is fair: a tenant waits behind its own requests, for its own part of the seats.
        part = max(1.0, line.seats / line.tenants(tenant))
        return (line.ahead(tenant, priority) + 1) * self._held / part

    def check(self, tenant: str, priority: int) -> float:
        """The forecast; Overloaded, if the wait would be too long."""
        forecast = self.forecast(tenant, priority)
        wait = forecast * self._off
        if wait > self._max_wait:
            raise Overloaded(
                f"this request would wait about {wait:.0f} s for its turn, and nobody is let in for more than "
                f"{self._max_wait:g} s: come again later",
                retry_after=max(1, math.ceil(wait - self._max_wait)),
            )
        return forecast

    def seated(self, forecast: float, waited: float) -> None:
        """A request got its seat."""
        if forecast > 0.1:
            off = min(max(waited / forecast, 1 / MOST), MOST)
            self._off += WEIGHT * (off - self._off)

    def left(self, held: float) -> None:
        """A request gave its seat back."""
        self._held += (WEIGHT if self._held else 1.0) * (held - self._held)
