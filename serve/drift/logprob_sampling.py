"""Which requests are answered with log-probabilities, so that their distribution can be watched."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

# Seconds that share one draw.
SLOT_SECONDS = 2.0


class LogprobSampling:
    """Samples a share of all requests, in slots of two seconds. Not thread-safe: the event loop's alone.

    A step of the engine costs more as soon as one request in its batch has log-probabilities. If 16 streams were
    sampled one by one at 5 %, more than half of all steps would have one; so all requests of one slot are sampled
    together. The draw does not depend on who answers, so both sides of a canary are sampled alike.
    """

    def __init__(self, share: float, *, seed: int = 0, clock: Callable[[], float] = time.time) -> None:
        self._share, self._clock = share, clock
        self._random = random.Random(seed)
        self._slot, self._sampled = -1, False

    def sampled(self) -> bool:
        """Whether a request that arrives now is sampled."""
        slot = int(self._clock() / SLOT_SECONDS)
        if slot != self._slot:
            self._slot, self._sampled = slot, self._random.random() < self._share
        return self._sampled
