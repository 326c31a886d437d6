"""How far recent requests lie from the reference, by their ranks there: it raises no alarm alone, and says how much.

Which part of [0, 1) foreign requests fill is not known. So the ends of the ranks of every score and direction are
looked at, and that counts which holds most above its width, less two standard errors of the requests (Wilson, Journal
of the American Statistical Association 22, 1927) and of the reference. It cannot tell a few foreign requests from all
that moved a little.
"""

from __future__ import annotations

import math

import numpy as np

from serve.drift.detector.bets import Floats

# Requests that are looked at, the latest.
RECENT = 512
# Ends of the ranks.
WIDTHS = (1 / 64, 1 / 16, 1 / 4)
# Standard errors that a share is taken less.
ERRORS = 2.0


def rank_shift(ranks: Floats, errors: float) -> Floats:
    """(streams,) from -0.5 to 0.5: mean of ranks (n, streams) less a half, and less its standard error; `errors`: of
    something with a standard deviation of 1."""
    if not len(ranks):
        return np.zeros(ranks.shape[1])
    shift = ranks.mean(axis=0) - 0.5
    return np.sign(shift) * np.maximum(np.abs(shift) - errors / math.sqrt(12), 0)


def foreign_share(ranks: Floats, size: int) -> float:
    """At least this share of the requests, of which these are the ranks (n, streams) in a reference of `size`, does not
    fit it."""
    n = len(ranks)
    if not n:
        return 0.0
    usual = [width + ERRORS * math.sqrt(width * (1 - width) / size) for width in WIDTHS]
    shares = [
        (_least(float((side >= 1 - width).mean(axis=0).max()), n) - most) / (1 - most)
        for side in (ranks, 1 - ranks)
        for width, most in zip(WIDTHS, usual, strict=True)
        if most < 1
    ]
    return max(0.0, *shares)


def _least(share: float, n: int) -> float:
    """The lower end of Wilson's interval for a share seen in n draws."""
    z = ERRORS**2 / n
    return (share + z / 2 - math.sqrt(z * (max(share * (1 - share), 0) + z / 4))) / (1 + z)
