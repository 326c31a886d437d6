"""A canary on trial against the live version, at the same time: one Comparison an adapter, and what follows of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve.adapters.snapshot import Share
from serve.asgi.exchange import Exchange
from serve.drift.features import refuses
from serve.rollout.sequential_test import CHECKS, GROUPS, Comparison, Finding, Verdict

# So many answers of a canary are looked at with log-probabilities; then it is sampled as everybody is.
CLOSELY = 300


@dataclass(frozen=True, slots=True)
class Judgement:
    """A verdict on a canary, once."""

    adapter: str
    live: int
    canary: int
    verdict: Verdict
    reason: str
    findings: tuple[Finding, ...]

    @property
    def evidence(self) -> dict[str, Any]:
        """For history, audit log and API."""
        told = self.findings
        if self.verdict is Verdict.WORSE:
            told = tuple(one for one in told if one.worse)
        return {"live": self.live, "canary": self.canary, "checks": [described(one) for one in told]}


class CanaryTrial:
    """One canary of one adapter against one live version."""

    def __init__(self, adapter: str, live: int, share: Share, alpha: float, seed: int) -> None:
        self.adapter, self.live, self.canary = adapter, live, share.adapter.version
        self.comparison = Comparison(min(share.weight, 0.99), checks=CHECKS, alpha=alpha, seed=seed)
        self.told = Verdict.UNDECIDED
        self._closely = 0

    def about(self, live: int, share: Share) -> bool:
        """Whether these two are the ones on trial."""
        return (self.live, self.canary) == (live, share.adapter.version)

    @property
    def closely(self) -> bool:
        """All of its requests should come with log-probabilities."""
        return self.told is not Verdict.WORSE and self._closely < CLOSELY

    def observe(self, exchange: Exchange) -> Judgement | None:
        """One request that was dealt to one of the two; a judgement when this one brought it about."""
        canary = exchange.version == f"v{self.canary}"
        values = _values(exchange)
        if canary and values.get("mean_logprob") is not None:
            self._closely += 1
        self.comparison.observe(canary, values, asker=exchange.asker)
        return self._judged()

    def rated(self, version: str, rating: float, asker: bytes | None) -> Judgement | None:
        """Feedback about a request that was dealt to one of the two."""
        known = None if asker is None else asker + b"\0rating"
        self.comparison.observe(version == f"v{self.canary}", {"rating": rating}, asker=known)
        return self._judged()

    def report(self) -> dict[str, Any]:
        """For the API."""
        return {
            "live": self.live,
            "canary": self.canary,
            "verdict": self.verdict.value,
            "alpha": self.comparison.alpha,
            "log_threshold": round(self.comparison.log_threshold, 3),
            "checks": [described(one) for one in self.comparison.findings()],
        }

    def evidence(self) -> dict[str, float]:
        """ln of the evidence that it is worse, by group of checks."""
        return {group: self.comparison.log_evidence(group) for group in GROUPS}

    def state(self) -> dict[str, NDArray]:
        versions = np.array([self.live, self.canary, self._closely])
        said = {"name": np.array(self.adapter), "told": np.array(self.told.value)}
        return {"versions": versions, **said, **self.comparison.state()}

    @classmethod
    def from_state(cls, state: Mapping[str, NDArray]) -> CanaryTrial:
        """The trial whose `state()` this was; ValueError or KeyError if it was none."""
        trial = cls.__new__(cls)
        trial.adapter = str(state["name"])
        trial.live, trial.canary, trial._closely = (int(one) for one in state["versions"])
        trial.told = Verdict(str(state["told"]))
        trial.comparison = Comparison.from_state(state, CHECKS)
        return trial

    @property
    def verdict(self) -> Verdict:
        """A version that has proved itself may still turn out worse later: that counts more."""
        said = self.comparison.verdict
        if said is Verdict.PROVED and any(one.worse for one in self.comparison.findings()):
            return Verdict.WORSE
        return said

    def _judged(self) -> Judgement | None:
        verdict = self.verdict
        if verdict in (Verdict.UNDECIDED, self.told):
            return None
        self.told = verdict
        reasons = self.comparison.reasons()
        reason = max(reasons, key=lambda one: one.log_evidence).group if reasons else "proved"
        found = tuple(self.comparison.findings())
        return Judgement(self.adapter, self.live, self.canary, verdict, reason, found)


class CanaryTrials:
    """`share(adapter)` is the canary that the registry has, `live(adapter)` the version that is live."""

    def __init__(
        self,
        share: Callable[[str], Share | None],
        live: Callable[[str], int | None],
        alpha: Callable[[str], float],
        seed: int = 0,
    ) -> None:
        self._share, self._live, self._alpha, self._seed = share, live, alpha, seed
        self.running: dict[str, CanaryTrial] = {}

    def observe(self, exchange: Exchange) -> Judgement | None:
        """One request; those of adapters without a canary, and those that asked for a version, are none of ours."""
        trial = self.of(exchange.adapter) if exchange.dealt else None
        if trial is None or exchange.version not in (f"v{trial.live}", f"v{trial.canary}"):
            return None
        return trial.observe(exchange)

    def rated(self, adapter: str, version: str, rating: float, asker: bytes | None) -> Judgement | None:
        """Feedback about a request that was dealt out."""
        trial = self.of(adapter)
        if trial is None or version not in (f"v{trial.live}", f"v{trial.canary}"):
            return None
        return trial.rated(version, rating, asker)

    def of(self, adapter: str) -> CanaryTrial | None:
        """The trial that goes on, begun now if need be."""
        share, live = self._share(adapter), self._live(adapter)
        if share is None or live is None or live == share.adapter.version or not 0 < share.weight < 1:
            return self.running.pop(adapter, None) and None
        trial = self.running.get(adapter)
        if trial is None or not trial.about(live, share):
            trial = self.running[adapter] = CanaryTrial(adapter, live, share, self._alpha(adapter), self._seed)
        elif trial.comparison.weight != share.weight:
            trial.comparison.set_weight(share.weight)
        return trial


def described(finding: Finding) -> dict[str, Any]:
    """A check for the API and the history."""
    return {
        "check": finding.name,
        "group": finding.group,
        "log_evidence": _finite(finding.log_evidence),
        "log_proof": _finite(finding.log_proof),
        "effect": _finite(finding.effect),
        "canary_requests": finding.canary,
        "live_requests": finding.live,
        "worse": finding.worse,
        "proved": finding.proved,
    }


def _values(exchange: Exchange) -> dict[str, float | None]:
    """What a request gives to the checks. What the client did wrong, or left, is nobody's error."""
    if exchange.status >= 500:
        return {"error": 1.0}
    if exchange.status != 200 or not exchange.generations:
        return {}
    one = exchange.generations[0]
    if one.finish_reason == "abort":
        return {}
    logprobs = one.logprobs
    return {
        "error": float(one.finish_reason == "error"),
        "inter_token": exchange.gap,
        "first_token": exchange.first,
        "length": float(len(one.output)) if one.output else None,
        "ended_by_length": float(one.finish_reason == "length"),
        "refusal": float(refuses(one.text)),
        "mean_logprob": sum(logprobs) / len(logprobs) if logprobs else None,
    }


def _finite(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None
