"""Where the mean of all cases like these lies, with 95 % confidence, when the cases count as drawn at random."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
Z = 1.959964  # the normal distribution's quantile for it


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate, and where the truth lies."""

    measured: float
    low: float
    high: float


def of_mean(values: Sequence[float]) -> Interval:
    """Of numbers, by Student's t; one alone says nothing of others."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return Interval(mean, -math.inf, math.inf)
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    half = student(count - 1) * spread / math.sqrt(count)
    return Interval(mean, mean - half, mean + half)


def of_change(lost: int, gained: int, count: int) -> Interval:
    """Of the share that is lost less the share that is gained, of pairs of yes or no (Bonett and Price, 2012)."""
    down, up = (lost + 1) / (count + 2), (gained + 1) / (count + 2)
    half = Z * math.sqrt((down + up - (down - up) ** 2) / (count + 2))
    return Interval((lost - gained) / max(count, 1), max(-1.0, down - up - half), min(1.0, down - up + half))


def of_share(yes: int, count: int) -> Interval:
    """Of a share (Wilson, 1927)."""
    if not count:
        return Interval(0.0, 0.0, 1.0)
    share = yes / count
    middle = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z / (1 + Z**2 / count) * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half))


def student(freedom: int) -> float:
    """Student's t for `CONFIDENCE`, two-sided (Abramowitz and Stegun 26.7.5; the first four from the table)."""
    if freedom < 5:
        return (12.7062, 4.30265, 3.18245, 2.77645)[freedom - 1]
    first = (Z**3 + Z) / 4
    second = (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96
    third = (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384
    return Z + first / freedom + second / freedom**2 + third / freedom**3
