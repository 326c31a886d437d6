"""One probability for the whole chain, from gate to promote.

A candidate is bad if it is not better than the live version on new traffic, worse by the tolerance on an earlier
reference (or on a golden set that is large enough), or worse by a check's tolerance in a check that its canary has to
prove. A try is given `alpha`. It promotes only if the gate passed at `alpha` and, where the policy has a canary, the
canary was PROVED at `alpha`. Each kind of badness is a hypothesis that one of the two has to refute. A bad candidate
makes one of them true, and P(that one is refuted) <= alpha, whatever the others do. So alpha is not divided between
gate and canary: both must agree (an intersection-union test). Nor is their evidence multiplied to reach a threshold
together: they measure different things, and one must not make up for the other.

The tries that are decided in a calendar month share the policy's alpha, one that began in the month before too. Each
spends alpha / budget, and none begins when less is left, also if the budget was changed meanwhile. By the union bound
the loop promotes a bad version in a month with a probability of at most alpha. That needs no independence between
tries, which see the same held-out examples again: a candidate is made of what may be trained on alone, and what is held
out is the same at every try.
"""

from __future__ import annotations

from serve.sequential.sequential_test import Verdict


def spend(alpha: float, budget: int, spent: float) -> float:
    """What the next try of a month may spend, where earlier ones have `spent`; 0: there is none."""
    share = alpha / budget
    return share if alpha - spent >= share * (1 - 1e-9) else 0.0


def promotes(gate_passed: bool, canary: Verdict | None) -> bool:
    """Whether the evidence is enough; None where the policy has no canary."""
    return gate_passed and canary in (None, Verdict.PROVED)
