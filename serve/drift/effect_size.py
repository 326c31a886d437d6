"""How far requests lie from the reference, seen on those that come after the evidence: they were not what raised it.

Which part of [0, 1) foreign requests fill is not known, so that many are tried: ends of the ranks of every score and
direction. If at most a share `tolerated` of the requests is foreign, a rank in the reference lies in a part of width w
with a probability of at most tolerated + (1 - tolerated) w, and a bet on more wins nothing in the mean. (w is widened
by two standard errors of a reference of that size: in a small one the ranks of its own kind are uneven.) A mean of such
bets, weighted by the evidence of each score so far, exceeds 1 / ALPHA with a probability of at most ALPHA, whenever one
looks (Ville's inequality; Waudby-Smith and Ramdas, Estimating means of bounded random variables by betting, 2024).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from serve.drift.bets import Floats, State

# Probability that a share that is tolerated is called larger.
ALPHA = 0.1
# Ends of the ranks: the upper ones, then the lower ones.
WIDTHS = np.array([1 / 64, 1 / 16, 1 / 4])
# What the bets take the share of foreign requests above the tolerated one for.
SHARES = np.array([0.05, 0.2, 0.8])
# Half-life of the counts, in requests.
_FADE = 0.5 ** (1 / 256)
_MOST = 300.0  # ln of a bet that is won


class EffectSize:
    """Of `streams` of ranks in a reference of `size` requests.

    `begin` when the evidence has reached the threshold, then `observe` each request.
    """

    def __init__(self, streams: int, size: int) -> None:
        self._usual = np.minimum(WIDTHS + 2 * np.sqrt(WIDTHS * (1 - WIDTHS) / size), 1)
        self._weights = np.full(streams, 1 / streams)
        self._logs = np.zeros((streams, 2 * len(WIDTHS), len(SHARES)))
        self._hits = np.zeros((streams, 2 * len(WIDTHS)))
        self._seen = np.zeros(1)

    def begin(self, weights: Floats) -> None:
        """Forget all; `weights`: (streams,) what each stream's bets weigh."""
        self._weights[:] = weights
        for kept in (self._logs, self._hits, self._seen):
            kept[:] = 0

    def observe(self, ranks: Floats, tolerated: float) -> None:
        """`ranks`: (streams,) of one request in the reference, in [0, 1]."""
        inside = np.concatenate((ranks[:, None] >= 1 - WIDTHS, ranks[:, None] <= WIDTHS), axis=1)
        usual = np.tile(tolerated + (1 - tolerated) * self._usual, 2)[:, None]
        larger = usual + (1 - usual) * SHARES
        with np.errstate(divide="ignore", invalid="ignore"):  # all may be foreign: no bet is won then
            won = np.log(larger / usual)
            lost = np.where(usual < 1, np.log((1 - larger) / (1 - usual)), 0.0)
        self._logs += np.where(inside[:, :, None], won, lost)
        np.minimum(self._logs, _MOST, out=self._logs)
        self._hits *= _FADE
        self._hits += inside
        self._seen *= _FADE
        self._seen += 1

    @property
    def requests(self) -> float:
        """How many were observed, the older ones for less."""
        return float(self._seen[0])

    @property
    def beyond(self) -> bool:
        """More than the tolerated share is foreign, with a confidence of 1 - ALPHA."""
        return float(self._weights @ np.exp(self._logs).mean(axis=(1, 2))) >= 1 / ALPHA

    @property
    def foreign_share(self) -> float:
        """At least this share of the requests does not fit the reference, less two standard errors; 0 before any."""
        if not self.requests:
            return 0.0
        scored = self._logs.max(axis=2) + np.log(np.maximum(self._weights, 1e-12))[:, None]
        stream, end = np.unravel_index(int(scored.argmax()), scored.shape)
        width = float(WIDTHS[end % len(WIDTHS)])
        least = _wilson(float(self._hits[stream, end]) / self.requests, self.requests)
        return max((least - width) / (1 - width), 0.0)

    def state(self) -> State:
        return {name: getattr(self, f"_{name}").copy() for name in _KEPT}

    def restore(self, state: Mapping[str, NDArray]) -> None:
        for name in _KEPT:
            getattr(self, f"_{name}")[:] = state[name]


_KEPT = ("weights", "logs", "hits", "seen")


def _wilson(share: float, n: float) -> float:
    """The lower end of Wilson's interval of two standard errors for a share seen in n draws."""
    z = 4 / n
    return (share + z / 2 - math.sqrt(z * (max(share * (1 - share), 0) + z / 4))) / (1 + z)
