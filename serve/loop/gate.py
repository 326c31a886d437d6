"""Is a candidate better on what is new, and no worse on what was? Tests on pairs of scores, one pair an example.

The same example is scored with the live version and with the candidate; d is the candidate's score less the live one's,
from -1 to 1. Each part of the gate refutes a hypothesis about E[d] by betting (serve.sequential.betting):

    new          E[d] <= 0             the candidate is not better on new traffic
    a reference  E[d] <= -tolerance    it is worse on an earlier held-out part of this adapter, each by itself
    golden       E[d] <= -golden       it is worse on the golden set

The gate passes a candidate when every part is refuted at `alpha`: its evidence has reached 1 / alpha. If any of them is
true, passing means refuting that one too, so P(pass) <= alpha, however many parts there are and however they hang
together (an intersection-union test). The assumption: the held-out examples of a part are exchangeable with the traffic
that the part speaks for, and neither the candidate nor the live version was trained on them.

Examples of one asker, or of one conversation, tell of one another. So the numbers that are bet on are not examples but
such clusters: the mean of d over the examples of each. A cluster counts once, however many examples it has.

The mix of topics moves between gathering and promotion. So on new traffic the candidate has to be better in the mix
that was gathered and in those where the odds of one of two topics (`serve.loop.topics`) are MOVES times as high, or as
low: a cluster weighs as much more as its topic has become more frequent. Each mix is one more hypothesis that has to be
refuted.

The order of the clusters is that of their examples' digests, which depends on no score.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve.sequential.betting import highest, needed_for_proof

NEW = "new"
REFERENCE = "reference"
GOLDEN = "golden"
# By how much the odds of a topic may move after gathering: from 60/40 to 40/60.
MOVES = 2.25
# What is shown of an evidence.
_DIGITS = 4


@dataclass(frozen=True, slots=True)
class Part:
    """One part of the gate; scores are means over its clusters. Evidence is ln, the highest that it has been."""

    kind: str
    label: str
    examples: int
    clusters: int
    live: float
    candidate: float
    tolerance: float
    log_evidence: float
    log_threshold: float
    needed: int

    @property
    def passed(self) -> bool:
        """The hypothesis is refuted."""
        if self.weak:
            return self.candidate > self.live - self.tolerance
        return self.log_evidence >= self.log_threshold

    @property
    def weak(self) -> bool:
        """A golden set that is too small to prove anything: the scores themselves are compared, without a guarantee."""
        return self.kind == GOLDEN and self.clusters < self.needed

    @property
    def forgotten(self) -> bool:
        """What an earlier reference holds is lost by more than the tolerance."""
        return self.kind != NEW and self.candidate <= self.live - self.tolerance

    @property
    def sentence(self) -> str:
        """For people, when it did not pass."""
        where = {NEW: "the new traffic", REFERENCE: f"the reference {self.label}", GOLDEN: "the golden set"}[self.kind]
        scores = f"{self.candidate:.3f} against {self.live:.3f} on {self._size}"
        if self.kind == NEW:
            return f"it is not proved to be better on {where}: {scores}"
        if self.forgotten:
            return f"it is worse on {where}: {scores}, and the tolerance is {self.tolerance:g}"
        what = "examples" if self.clusters == self.examples else "askers"
        few = f"; {self.needed} {what} are needed at least" if self.clusters < self.needed else ""
        return f"it is not proved to be no worse by {self.tolerance:g} on {where}: {scores}{few}"

    @property
    def _size(self) -> str:
        askers = "" if self.clusters == self.examples else f" of {self.clusters} askers"
        return f"{self.examples} examples{askers}"

    def described(self) -> dict[str, Any]:
        """For history, API and webhooks."""
        return {
            "part": self.kind,
            "label": self.label,
            "examples": self.examples,
            "clusters": self.clusters,
            "live": round(self.live, _DIGITS),
            "candidate": round(self.candidate, _DIGITS),
            "tolerance": self.tolerance,
            "log_evidence": round(self.log_evidence, _DIGITS),
            "log_threshold": round(self.log_threshold, _DIGITS),
            "passed": self.passed,
            "forgotten": self.forgotten,
            "guaranteed": not self.weak,
        }


@dataclass(frozen=True, slots=True)
class Gate:
    """All parts of one try, which spends `alpha`."""

    alpha: float
    parts: tuple[Part, ...]

    @property
    def passed(self) -> bool:
        return bool(self.parts) and all(part.passed for part in self.parts)

    @property
    def forgotten(self) -> tuple[Part, ...]:
        return tuple(part for part in self.parts if part.forgotten)

    @property
    def sentence(self) -> str:
        """What it came to."""
        if self.passed:
            return f"better on new traffic and no worse elsewhere ({len(self.parts)} parts, alpha {self.alpha:g})"
        return "; ".join(part.sentence for part in self.parts if not part.passed) or "there was nothing to compare on"

    def described(self) -> dict[str, Any]:
        return {"passed": self.passed, "alpha": self.alpha, "parts": [part.described() for part in self.parts]}


def compared(
    kind: str,
    label: str,
    pairs: Sequence[tuple[float, float]],
    tolerance: float,
    alpha: float,
    clusters: Sequence[str] = (),
    topics: Sequence[int] = (),
) -> Part:
    """A part from pairs of scores (live, candidate) from 0 to 1, in an order that depends on no score.

    clusters: which one each pair belongs to; by default each is one of its own. topics: 0 or 1 for each pair, of those
    whose mix may move; by default there is one.
    """
    if clusters and len(clusters) != len(pairs):
        raise ValueError(f"{len(pairs)} pairs come with {len(clusters)} clusters; each pair has one")
    means = _means(pairs, clusters)
    live, candidate = means.T
    share = _means([(topic, topic) for topic in topics], clusters)[:, 0] if topics else np.zeros(len(means))
    differences = candidate - live
    margin = 0.0 if kind == NEW else tolerance
    count = max(len(means), 1)
    return Part(
        kind,
        label,
        len(pairs),
        len(means),
        float(live.sum()) / count,
        float(candidate.sum()) / count,
        tolerance,
        min(
            highest(weights * (differences + margin), weights.max(initial=1) * (1 - margin))
            for weights in _mixes(share)
        ),
        -math.log(alpha),
        needed_for_proof(tolerance, alpha),
    )


def _means(pairs: Sequence[tuple[float, float]], clusters: Sequence[str]) -> NDArray[np.float64]:
    """(clusters, 2): the mean scores of each, in the order in which they come first."""
    scores = np.array(pairs, np.float64).reshape(-1, 2)
    if not clusters:
        return scores
    numbers: dict[str, int] = {}
    places = [numbers.setdefault(cluster, len(numbers)) for cluster in clusters]
    totals = np.zeros((len(numbers), 2))
    np.add.at(totals, places, scores)
    return totals / np.bincount(places)[:, None]


def _mixes(share: NDArray[np.float64]) -> Iterator[NDArray[np.float64]]:
    """(clusters,) what each weighs in the mix that was gathered, and in those that it may become; share: of each, what
    is of the second topic."""
    yield np.ones(len(share))
    gathered = float(share.mean()) if len(share) else 0.0
    if 0 < gathered < 1:
        for odds in (MOVES, 1 / MOVES):
            moved = gathered * odds / (1 - gathered + gathered * odds)
            yield share * moved / gathered + (1 - share) * (1 - moved) / (1 - gathered)
