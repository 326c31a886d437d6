"""Whether a request may join the fair queue: not, if it would wait there longer than `max_wait`.

The forecast follows from how long requests held their seats lately, and from how far such forecasts were off.
"""

from __future__ import annotations

import math

from serve.engine.fair_queue import FairQueue
from serve.errors import Overloaded

# How much the latest observation counts.
WEIGHT = 0.1
# A forecast is never corrected by more than this factor.
MAX_CORRECTION = 4.0


class Admission:
    """Admission to one queue; `max_wait` in seconds."""

    def __init__(self, queue: FairQueue, max_wait: float) -> None:
        self._queue = queue
        self._max_wait = max_wait
        # Seconds that a request holds its seat, and what forecasts are multiplied by: means of what was seen lately.
        self._hold_seconds = 0.0
        self._correction = 1.0

    def forecast(self, tenant: str, priority: int, size: int = 1) -> float:
        """Seconds that one more request of the tenant would wait for a seat, by how long seats were held lately alone.

        The correction is learned from these: learned from corrected forecasts, which come true a whole wait later, it
        would swing from one extreme to the other.
        """
        queue = self._queue
        if queue.busy + size <= queue.seats and not (queue.waiting and queue.has_seat(tenant)):
            return 0.0
        # The queue is fair: a tenant waits behind its own requests, for its own part of the seats.
        seats = max(1.0, queue.seats / queue.count_tenants(tenant))
        return (queue.ahead(tenant, priority) + size) * self._hold_seconds / seats

    def check(self, tenant: str, priority: int, size: int = 1) -> float:
        """The forecast for a request of `size` seats; Overloaded, if the wait would be too long."""
        forecast = self.forecast(tenant, priority, size)
        wait = forecast * self._correction
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
            correction = min(max(waited / forecast, 1 / MAX_CORRECTION), MAX_CORRECTION)
            self._correction += WEIGHT * (correction - self._correction)

    def left(self, held: float) -> None:
        """A request gave its seat back."""
        self._hold_seconds += (WEIGHT if self._hold_seconds else 1.0) * (held - self._hold_seconds)
