"""Is the canary worse than the live version on the same golden cases? A sequential test on pairs, valid at any time.

Each case gives a pair: the live version's score minus the canary's, d, from -1 to 1. If the cases are a random sample
of what the adapter is for, and the canary is worse by no more than the tolerance, then E[d] <= tolerance, and
W = product of 1 + l * (d - tolerance) is a supermartingale for each l in [0, 1 / (1 + tolerance)): the capital of one
who bets on the discordant pairs. The mean over several l is one too, so by Ville's inequality P(W >= 1 / alpha, ever)
<= alpha, looked at after every case (Waudby-Smith and Ramdas, Estimating means of bounded random variables by
betting, 2024). PROVED turns the question round, as serve.sequential.sequential_test does: "worse by the margin or more"
is refuted.

A case counts once a version, by its first outcome: answers at temperature 0 repeat, and the same case again is no new
draw from the population of cases, whatever the temperature.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from serve.sequential.betting import BETS, highest, needed, needed_for_proof

# Points of the score, from 0 to 1. A version worse by less than the tolerance is not called worse.
TOLERANCE = 0.02
# What has to be refuted for PROVED, and what a set should be able to find.
MARGIN = 0.10
# The part of a canary's alpha that its golden set gets, from the other checks, if there is a set.
ALPHA_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class GoldenComparison:
    """Two versions on the cases that both have answered. Evidence is ln, and the highest that it has been."""

    cases: int
    live_score: float
    canary_score: float
    live_better: int
    canary_better: int
    log_evidence: float
    log_proof: float
    log_threshold: float
    log_proof_threshold: float
    needed: int
    needed_for_proof: int

    @property
    def gap(self) -> float:
        """How much worse the canary is, in points of the score."""
        return self.live_score - self.canary_score

    @property
    def worse(self) -> bool:
        return self.log_evidence >= self.log_threshold

    @property
    def proved(self) -> bool:
        return not self.worse and self.log_proof >= self.log_proof_threshold

    def described(self) -> dict[str, Any]:
        """For history and API."""
        return {
            "cases": self.cases,
            "live_score": round(self.live_score, 4),
            "canary_score": round(self.canary_score, 4),
            "worse_by": round(self.gap, 4),
            "live_better": self.live_better,
            "canary_better": self.canary_better,
            "log_evidence": round(self.log_evidence, 4),
            "log_threshold": round(self.log_threshold, 4),
            "log_proof": round(self.log_proof, 4),
            "tolerance": TOLERANCE,
        }


def compare(pairs: Sequence[tuple[float, float]], alpha: float) -> GoldenComparison:
    """Pairs of scores (live, canary), one a case, in an order that depends on no answer; alpha: of the whole canary."""
    live, canary = np.array(pairs, np.float64).reshape(-1, 2).T
    differences = live - canary
    count = max(len(pairs), 1)
    own = alpha * ALPHA_SHARE
    return GoldenComparison(
        cases=len(pairs),
        live_score=float(live.sum()) / count,
        canary_score=float(canary.sum()) / count,
        live_better=int((differences > 0).sum()),
        canary_better=int((differences < 0).sum()),
        log_evidence=highest(differences - TOLERANCE, 1 + TOLERANCE),
        log_proof=highest(MARGIN - differences, 1 - MARGIN),
        log_threshold=-math.log(own),
        log_proof_threshold=-math.log(alpha),
        needed=cases_needed(MARGIN, own),
        needed_for_proof=needed_for_proof(MARGIN, alpha),
    )


def cases_needed(gap: float, alpha: float) -> int:
    """Cases after which a canary that fails `gap` of those that the live version passes is typically called worse."""
    return needed(
        max(
            gap * math.log1p(bet / (1 + TOLERANCE) * (1 - TOLERANCE))
            + (1 - gap) * math.log1p(-bet / (1 + TOLERANCE) * TOLERANCE)
            for bet in BETS
        ),
        alpha,
    )
