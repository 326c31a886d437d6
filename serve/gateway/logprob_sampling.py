"""Which requests are answered with log-probabilities, so that their distribution can be watched."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

# Seconds that share one draw.
SLOT_SECONDS = 2.0
# Of the requests to an adapter that has no reference yet: its 300 rows come with the first 1,000 requests.
GATHERING_SHARE = 0.3


class LogprobSampling:
    """Samples a share of all requests, in slots of two seconds. Not thread-safe: the event loop's alone.

    A step of the engine costs more as soon as one request in its batch has log-probabilities. If 16 streams were
    sampled one by one at 5 %, more than half of all steps would have one; so all requests of one slot are sampled
    together. The draw does not depend on who answers, so both sides of a canary are sampled alike.

    `by_request`: each request is drawn by itself. Where hundreds are in a batch and answers last half a minute, as on a
    GPU, a slot's requests would be in half of all steps, and log-probabilities of few rows cost a step little.
    """

    def __init__(
        self, share: float, *, seed: int = 0, clock: Callable[[], float] = time.time, by_request: bool = False
    ) -> None:
        self._by_request = by_request
        self._share, self._clock = share, clock
        # Who configures none gets none.
        self._gathering_share = max(share, GATHERING_SHARE) if share else 0.0
        self._random = random.Random(seed)
        self._slot, self._drawn = -1, 1.0

    def sampled(self, gathering: bool = False) -> bool:
        """Whether a request that arrives now is sampled; `gathering`: its adapter has no reference yet."""
        slot = int(self._clock() / SLOT_SECONDS)
        if self._by_request or slot != self._slot:
            self._slot, self._drawn = slot, self._random.random()
        return self._drawn < (self._gathering_share if gathering else self._share)
