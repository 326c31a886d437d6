"""One canary compared with the live version that answers beside it: the analysis, and the verdict that ends it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve.adapters.registry.snapshot import Share
from serve.asgi.exchange import Exchange
from serve.events import CanaryVerdict
from serve.models.refusals import refuses
from serve.rollout.canary.askers_seen import AskersSeen
from serve.rollout.canary.key_weights import KeyWeights
from serve.rollout.prefill_times import PrefillTimes
from serve.sequential.proof_forecast import Forecast
from serve.sequential.sequential_test import CHECKS, GROUPS, HARM_CHECKS, Check, CheckResult, Comparison, Verdict

# The first answers of a canary all come with log-probabilities; later ones are sampled as everybody's are.
ANSWERS_WITH_LOGPROBS = 300


class CanaryAnalysis:
    """One canary of one adapter against one live version. Not thread-safe."""

    def __init__(
        self, adapter: str, live: int, share: Share, alpha: float, seed: int, checks: Sequence[Check] = CHECKS
    ) -> None:
        self.adapter = adapter
        self.live = live
        self.canary = share.adapter.version
        self.comparison = Comparison(min(share.weight, 0.99), checks=checks, alpha=alpha, seed=seed)
        # The verdict that was announced last.
        self.announced = Verdict.UNDECIDED
        self._with_logprobs = 0
        self._prefill = PrefillTimes()
        self._askers = AskersSeen()
        self._weights = KeyWeights()

    def compares(self, live: int, share: Share) -> bool:
        """Whether this is the analysis of these two versions."""
        return (self.live, self.canary) == (live, share.adapter.version)

    @property
    def wants_logprobs(self) -> bool:
        """All requests of the adapter should come with log-probabilities."""
        compared = any(check.name == "mean_logprob" for check in self.comparison.checks)
        return compared and self.announced is not Verdict.WORSE and self._with_logprobs < ANSWERS_WITH_LOGPROBS

    def observe(self, exchange: Exchange, has_say: bool = True) -> CanaryVerdict | None:
        """Count one request that was dealt to one of the two; the verdict, if it led to one.

        `has_say`: its tenant's requests count without a bound.
        """
        if not self._weights.takes_request(exchange, has_say):
            return None
        canary = exchange.version == f"v{self.canary}"
        values = self._values(exchange, canary)
        self._askers.observe(exchange)
        if canary and values.get("mean_logprob") is not None:
            self._with_logprobs += 1
        self.comparison.observe(canary, values, asker=exchange.counted_as)
        return self._new_verdict()

    def rate(
        self, version: str, rating: float, counted_as: bytes | None, key: str = "", limit: int = 0
    ) -> CanaryVerdict | None:
        """Count feedback about a request that was dealt to one of the two; the verdict, if it led to one.

        It came with the API key of this id, of whose ratings `limit` count.
        """
        canary = version == f"v{self.canary}"
        if not self._weights.takes_rating(key, limit):
            return None
        # Within a key: nobody rates in the place of another's users.
        asker = None if counted_as is None else counted_as + b"\0rating\0" + key.encode()
        self.comparison.observe(canary, {"rating": rating}, asker=asker)
        return self._new_verdict()

    def report(self) -> dict[str, Any]:
        """For the API."""
        return {
            "live": self.live,
            "canary": self.canary,
            "verdict": self.verdict.value,
            "alpha": self.comparison.alpha,
            "log_threshold": round(self.comparison.log_threshold, 3),
            "requests": self.comparison.requests,
            "skipped": self.comparison.skipped,
            **self._askers.report(),
            **self._weights.report(),
            "requests_to_proof": _range(self.comparison.to_proof()),
            "checks": [described(result) for result in self.comparison.results()],
        }

    def evidence(self) -> dict[str, float]:
        """ln of the evidence that the canary is worse, by group of checks."""
        return {group: self.comparison.log_evidence(group) for group in GROUPS}

    def state(self) -> dict[str, NDArray]:
        versions = np.array([self.live, self.canary, self._with_logprobs])
        names = {"name": np.array(self.adapter), "told": np.array(self.announced.value)}
        seen = {**self._prefill.state(), **self._askers.state(), **self._weights.state()}
        return {"versions": versions, **names, **seen, **self.comparison.state()}

    @classmethod
    def from_state(cls, state: Mapping[str, NDArray]) -> CanaryAnalysis:
        """The analysis whose `state()` this was; ValueError or KeyError if it was none."""
        self = cls.__new__(cls)
        self.adapter = str(state["name"])
        self.live, self.canary, self._with_logprobs = (int(number) for number in state["versions"])
        self.announced = Verdict(str(state["told"]))
        harms = state["checks"].tolist() == [check.name for check in HARM_CHECKS]
        self.comparison = Comparison.from_state(state, HARM_CHECKS if harms else CHECKS)
        self._prefill = PrefillTimes()
        self._askers = AskersSeen()
        self._weights = KeyWeights()
        # Files of earlier releases have neither.
        if "knots" in state:
            self._prefill.restore(state)
            self._askers.restore(state)
        if "key_requests" in state:
            self._weights.restore(state)
        return self

    @property
    def verdict(self) -> Verdict:
        """A version that has proved itself may still turn out worse later: that counts more."""
        verdict = self.comparison.verdict
        if verdict is Verdict.PROVED and any(result.worse for result in self.comparison.results()):
            return Verdict.WORSE
        return verdict

    def current_verdict(self) -> CanaryVerdict | None:
        """The verdict as of now; None while there is none."""
        verdict = self.verdict
        if verdict is Verdict.UNDECIDED:
            return None
        reasons = self.comparison.reasons()
        reason = max(reasons, key=lambda result: result.log_evidence).group if reasons else "proved"
        results = self.comparison.results()
        if verdict is Verdict.WORSE:
            results = [result for result in results if result.worse]
        evidence = {"live": self.live, "canary": self.canary, "checks": [described(result) for result in results]}
        return CanaryVerdict(self.adapter, self.live, self.canary, verdict, reason, evidence)

    def _values(self, exchange: Exchange, canary: bool) -> dict[str, float | None]:
        """What a request gives to the checks. What the client did wrong, or left, is nobody's error."""
        if exchange.status >= 500:
            return {"error": 1.0}
        if exchange.status != 200 or not exchange.generations:
            return {}
        generation = exchange.generations[0]
        if generation.finish_reason == "abort":
            return {}
        logprobs = generation.logprobs
        return {
            "error": float(generation.finish_reason == "error"),
            "inter_token": exchange.gap,
            "first_token": self._first_token(exchange, canary),
            "length": float(len(generation.output)) if generation.output else None,
            "ended_by_length": float(generation.finish_reason == "length"),
            "refusal": float(refuses(generation.text)),
            "mean_logprob": sum(logprobs) / len(logprobs) if logprobs else None,
        }

    def _first_token(self, exchange: Exchange, canary: bool) -> float | None:
        """The time to the first token without any queue, for as many computed tokens as it had."""
        prefill = exchange.prefill
        return None if prefill is None else self._prefill.relative(*prefill, canary=canary)

    def _new_verdict(self) -> CanaryVerdict | None:
        verdict = self.verdict
        if verdict in (Verdict.UNDECIDED, self.announced):
            return None
        self.announced = verdict
        return self.current_verdict()


def described(result: CheckResult) -> dict[str, Any]:
    """A check for the API and the history."""
    return {
        "check": result.name,
        "group": result.group,
        "log_evidence": _finite(result.log_evidence),
        "log_proof": _finite(result.log_proof),
        "effect": _finite(result.effect),
        "canary_requests": result.canary,
        "live_requests": result.live,
        "worse": result.worse,
        "proved": result.proved,
        "requests_to_proof": _range(result.to_proof),
        **({"note": result.note} if result.note else {}),
    }


def _finite(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None


def _range(forecast: Forecast | None) -> dict[str, int | None] | None:
    """Whole requests; None for a bound that is not in sight."""
    if forecast is None:
        return None
    bounds = {"low": forecast.low, "expected": forecast.expected, "high": forecast.high}
    return {name: math.ceil(bound) if math.isfinite(bound) else None for name, bound in bounds.items()}
