"""How far requests lie from the reference, seen on those that come after first evidence: they did not choose the bets.

Which part of [0, 1) foreign requests fill is not known, so that many are tried: ends of the ranks of the streams with
the most evidence. How often a usual request lies in the part above k of m reference requests is not
known either, but how that chance varies from reference to reference: it is Beta(m + 1 - k, k) distributed, whatever the
scores. If at most a share `tolerated` of the requests is foreign, each lies there with a probability of at most
tolerated + (1 - tolerated) times that chance. The likelihood of the requests under more than that, divided by the
likelihood under that, both in the mean over the chance, is what a bet on more has won. A mean of such bets exceeds
1 / ALPHA with a probability of at most ALPHA, whenever one looks (Ville's inequality). What each weighs is learned from
the requests before, which the bets are not placed on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from serve.drift.detector.bets import Floats, State

# Half-life of the gauges that say how far something moved, in requests.
EFFECT_HALF_LIFE = 50.0
# Probability that a share that is tolerated is called larger.
ALPHA = 0.1
# Ends of the ranks: the upper ones, then the lower ones.
WIDTHS = (1 / 64, 1 / 16, 1 / 4)
ENDS = 2 * len(WIDTHS)
# What the bets take the share of foreign requests above the tolerated one for.
SHARES = np.array([0.03, 0.1, 0.3, 0.9])
# Streams that are bet on.
STRONGEST = 8
# Chances of a usual request that stand for all of them.
CHANCES = 31
# At every one of the first requests, and later at every so many, one looks.
FIRST, EVERY = 32, 8
# Half-life of what the estimate of the share counts, in requests.
_FADE = 0.5 ** (1 / 256)
_MOST = 300.0  # ln of what a bet wins


class EffectSize:
    """Of `streams` of ranks in a reference of `size` requests, of which the last `rising` can only move up.

    `begin` when there is some evidence, then `observe` each request.
    """

    def __init__(self, streams: int, size: int, rising: int = 0) -> None:
        self._size = size
        self._in_end = np.array([math.floor(width * size) for width in WIDTHS])
        self._chances = np.array([_chances(inside + 1, size) for inside in self._in_end] * 2)  # (ENDS, CHANCES)
        # Which of the ends are bet on, (streams, ENDS, 1), with the sum 1 in each stream.
        self._ends = np.full((streams, ENDS, 1), 1 / ENDS)
        self._ends[streams - rising :] = np.repeat((1 / len(WIDTHS), 0.0), len(WIDTHS))[:, None]
        # What each bet weighs, (streams, ENDS, SHARES), and the requests that lie in each end since `begin`.
        self._weights = np.full((streams, ENDS, len(SHARES)), 1 / (streams * ENDS * len(SHARES)))
        self._counts = np.zeros((streams, ENDS))
        self._total = np.zeros(1)
        # The same of recent requests, for the estimate.
        self._hits = np.zeros((streams, ENDS))
        self._seen = np.zeros(1)
        self._beyond = False
        # ln of the chances of a request to lie in an end, and not to, (ENDS, CHANCES) and (ENDS, SHARES, CHANCES): if
        # `_tolerated` of the requests are foreign, and with one of SHARES more.
        self._tolerated = math.nan
        self._usual, self._larger = np.zeros((2, ENDS, CHANCES)), np.zeros((2, ENDS, len(SHARES), CHANCES))

    def begin(self, weights: Floats, less: Floats, upto: Floats, tolerated: float) -> None:
        """Forget all, and choose what to bet on.

        weights: (streams,) by their evidence. less, upto: (n, streams) as in `observe`, of requests before.
        """
        for kept in (self._counts, self._total, self._hits, self._seen):
            kept[:] = 0
        self._beyond = False
        chosen = np.where(weights >= np.sort(weights)[-STRONGEST:][0], weights, 0.0)
        chosen /= chosen.sum()
        self._weights[:] = chosen[:, None, None] * self._ends / len(SHARES)
        counts = self._inside(less, upto).sum(axis=0)
        won = self._weights * np.exp(np.minimum(self._logs(counts, len(less), tolerated), _MOST))
        self._weights += won / won.sum()
        self._weights /= 2

    def observe(self, less: Floats, upto: Floats, tolerated: float) -> None:
        """Of one request, (streams,): how many of the reference's lie below it, and how many not above it."""
        inside = self._inside(less, upto)
        self._counts += inside
        self._total += 1
        self._hits *= _FADE
        self._hits += inside
        self._seen *= _FADE
        self._seen += 1
        if self._total <= FIRST or self._total % EVERY == 0:
            logs = self._logs(self._counts, float(self._total[0]), tolerated)
            self._beyond = float(np.vdot(self._weights, np.exp(np.minimum(logs, _MOST)))) >= 1 / ALPHA

    @property
    def requests(self) -> float:
        """How many were observed, the older ones for less."""
        return float(self._seen[0])

    @property
    def beyond(self) -> bool:
        """More than the tolerated share is foreign, with a confidence of 1 - ALPHA."""
        return self._beyond

    def foreign_share(self, tolerated: float) -> float:
        """At least this share of the requests does not fit the reference, less three standard errors: one looks when
        many were seen. 0 before any."""
        if not self.requests:
            return 0.0
        logs = self._logs(self._counts, float(self._total[0]), tolerated) + np.log(np.maximum(self._weights, 1e-300))
        stream, end = np.unravel_index(int(logs.max(axis=2).argmax()), self._hits.shape)
        width = WIDTHS[end % len(WIDTHS)]
        least = _wilson(float(self._hits[stream, end]) / self.requests, self.requests)
        # What is proved to be more than is tolerated is more than that.
        return max((least - width) / (1 - width), math.nextafter(tolerated, 1.0) if self._beyond else 0.0)

    def _inside(self, less: Floats, upto: Floats) -> NDArray[np.bool_]:
        """(..., streams, ENDS): which ends a request lies in, with all that are equal to it."""
        upper = less[..., None] >= self._size - self._in_end
        return np.concatenate((upper, upto[..., None] <= self._in_end), axis=-1)

    def _logs(self, counts: Floats, total: float, tolerated: float) -> Floats:
        """(streams, ENDS, SHARES): ln of what each bet has won with that many of `total` requests in each end."""
        logs = np.full((len(counts), ENDS, len(SHARES)), 0.0)
        if tolerated >= 1:  # nothing is more than that
            return logs
        self._tolerate(tolerated)
        bet_on = np.flatnonzero(self._weights.any(axis=(1, 2)))
        inside, outside = counts[bet_on, :, None], total - counts[bet_on, :, None]
        null = inside * self._usual[0] + outside * self._usual[1]  # (streams, ENDS, CHANCES)
        more = inside[..., None] * self._larger[0] + outside[..., None] * self._larger[1]
        logs[bet_on] = _log_sum(more) - _log_sum(null)[..., None]
        return logs

    def _tolerate(self, tolerated: float) -> None:
        """Have the logarithms ready."""
        if tolerated == self._tolerated or tolerated >= 1:
            return
        usual = tolerated + (1 - tolerated) * self._chances
        larger = usual[:, None] + (1 - usual[:, None]) * SHARES[:, None]
        self._usual[:], self._larger[:] = (np.log(usual), np.log1p(-usual)), (np.log(larger), np.log1p(-larger))
        self._tolerated = tolerated

    def state(self) -> State:
        return {name: getattr(self, f"_{name}").copy() for name in _KEPT} | {"beyond": np.array([self._beyond])}

    def restore(self, state: Mapping[str, NDArray]) -> None:
        """Go on where this `state()` was."""
        for name in _KEPT:
            getattr(self, f"_{name}")[...] = state[name]
        self._beyond = bool(state["beyond"][0])


_KEPT = ("weights", "counts", "total", "hits", "seen")


def _chances(rank: int, size: int) -> Floats:
    """(CHANCES,) equally likely values of a Beta(rank, size + 1 - rank) variable."""
    grid = (np.arange(8192) + 0.5) / 8192
    logs = (rank - 1) * np.log(grid) + (size - rank) * np.log1p(-grid)
    cumulated = np.exp(logs - logs.max()).cumsum()
    return np.interp((np.arange(CHANCES) + 0.5) / CHANCES, cumulated / cumulated[-1], grid)


def _log_sum(logs: Floats) -> Floats:
    """ln of the sum of exp over the last axis."""
    most = logs.max(axis=-1)
    total: Floats = most + np.log(np.exp(logs - most[..., None]).sum(axis=-1))
    return total


def _wilson(share: float, n: float) -> float:
    """The lower end of Wilson's interval of three standard errors for a share seen in n draws."""
    z = 9 / n
    return (share + z / 2 - math.sqrt(z * (max(share * (1 - share), 0) + z / 4))) / (1 + z)
