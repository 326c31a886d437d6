"""Analyses all canaries: an observer of the exchange worker, with a file on the disk and metrics of its own."""

from __future__ import annotations

import io
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from serve.adapters.registry.registry import Registry
from serve.adapters.registry.snapshot import Share
from serve.asgi.exchange import Exchange
from serve.events import CanaryVerdict, Events
from serve.files import write_whole
from serve.rollout.canary.canary import CanaryAnalysis
from serve.rollout.policy import Policies
from serve.sequential.proof_forecast import UNKNOWN
from serve.sequential.sequential_test import CHECKS, HARM_CHECKS, Verdict

log = logging.getLogger(__name__)

FILE = "trials.npz"
# ln of evidence as low as this is shown as this.
LOWEST_LOG_EVIDENCE = -20.0


class Levels(Protocol):
    def alpha(self, adapter: str) -> float:
        """What the checks of its traffic have of a canary's alpha."""


class Tries(Protocol):
    """What a loop says of canaries: those of its tries are its own. All of it blocks."""

    def alpha(self, adapter: str) -> float:
        """What a false verdict on the adapter's canary may cost, if it is its loop's; else 1."""

    def begin(self, adapter: str, live: int, canary: int) -> float:
        """The part of a canary's alpha that the analysis which begins here may spend."""

    def is_candidate(self, adapter: str, version: int) -> bool:
        """The version is meant to answer otherwise: only what harms is compared."""

    def heard(self, verdict: CanaryVerdict) -> bool:
        """Note the verdict; whether the loop acts on it, and nobody else."""


class CanaryMonitor(Collector):
    """`golden` says what of an adapter's alpha is left to the traffic. `label` gives a version's metric labels.

    Publishes each verdict once, from the worker's thread, and by `start` earlier verdicts whose canary still has
    traffic.
    """

    def __init__(
        self,
        folder: Path,
        registry: Registry,
        policies: Policies,
        golden: Levels,
        tries: Tries,
        events: Events,
        *,
        label: Callable[[str, str], tuple[str, str]] = lambda adapter, version: (adapter, version),
        seed: int = 0,
    ) -> None:
        self._folder = folder
        self._registry = registry
        self._policies = policies
        self._golden = golden
        self._tries = tries
        self._events = events
        self._label = label
        self._seed = seed
        self._lock = threading.Lock()
        self._analyses: dict[str, CanaryAnalysis] = {}
        # Read by the event loop, which does not take the lock.
        self._wanting_logprobs: frozenset[str] = frozenset()

    # Observer of the exchange worker

    def start(self) -> None:
        """Go on with the analyses that were saved."""
        with self._lock:
            saved = self._read()
            self._analyses |= {analysis.adapter: analysis for analysis in saved}
            self._refresh_wanting()
            verdicts = [analysis.current_verdict() for analysis in saved if self._unsettled(analysis)]
        # The server may have stopped before it could act on them.
        for verdict in verdicts:
            if verdict is not None:
                self._events.publish(replace(verdict, repeated=True))

    def observe(self, exchange: Exchange) -> None:
        """Count a request that was dealt out by a traffic split; one that asked for a version by number is not."""
        if exchange.dealt:
            has_say = self._policies[exchange.adapter].verdicts.has(exchange.adapter, exchange.tenant)
            self._update(exchange.adapter, exchange.version, lambda analysis: analysis.observe(exchange, has_say))

    def rate(self, adapter: str, version: str, rating: float, counted_as: bytes | None, key: str = "") -> None:
        """Count feedback about a request that was dealt out, of a tenant that has a say, with the key of this id."""
        limit = 2 * self._policies[adapter].verdicts.ratings_per_key  # there are two versions
        self._update(adapter, version, lambda analysis: analysis.rate(version, rating, counted_as, key, limit))

    def looked(self) -> None:
        """Every exchange has been counted."""

    def save(self) -> None:
        """Write all analyses to the file."""
        with self._lock:
            states = [analysis.state() for analysis in self._analyses.values()]
        self._write(states)

    def stop(self) -> None:
        self.save()

    def end(self, adapter: str, canary: int) -> None:
        """The canary has been ended: forget its analysis."""
        with self._lock:
            analysis = self._analyses.get(adapter)
            if analysis is not None and analysis.canary == canary:
                del self._analyses[adapter]
                self._refresh_wanting()

    # For others

    def wants_logprobs(self, adapter: str) -> bool:
        """Whether all requests of this adapter should be answered with log-probabilities."""
        return adapter in self._wanting_logprobs

    def analysis(self, adapter: str) -> CanaryAnalysis | None:
        """The analysis of the adapter's canary, if one goes on."""
        return self._analyses.get(adapter)

    def report(self, adapter: str) -> dict[str, Any] | None:
        """How the adapter's canary does, for the API."""
        with self._lock:
            analysis = self._analyses.get(adapter)
            return analysis.report() if analysis else None

    def collect(self) -> Iterator[Metric]:
        checks = GaugeMetricFamily(
            "loradock_swap_log_evidence",
            "Natural logarithm of the evidence that the canary does worse than the live version, by check.",
            labels=("adapter", "version", "check"),
        )
        threshold = GaugeMetricFamily(
            "loradock_swap_threshold_log_evidence",
            "ln of the evidence at which the canary is called worse: 1 / alpha of the adapter's policy.",
            labels=("adapter", "version"),
        )
        proof = GaugeMetricFamily(
            "loradock_canary_requests_to_proof",
            "Further requests, of both versions, until the canary has proved itself, from the noise seen so far, and "
            "its bounds for four of five cases; +Inf while that is not in sight.",
            labels=("adapter", "version", "bound"),
        )
        with self._lock:
            for adapter, analysis in self._analyses.items():
                labels = self._label(adapter, f"v{analysis.canary}")
                for group, evidence in analysis.evidence().items():
                    checks.add_metric((*labels, group), max(evidence, LOWEST_LOG_EVIDENCE))
                threshold.add_metric(labels, analysis.comparison.log_threshold)
                forecast = analysis.comparison.to_proof() or UNKNOWN
                for bound in ("low", "expected", "high"):
                    proof.add_metric((*labels, bound), getattr(forecast, bound))
        yield from (checks, threshold, proof)

    def _update(self, adapter: str, version: str, count: Callable[[CanaryAnalysis], CanaryVerdict | None]) -> None:
        with self._lock:
            analysis = self._current(adapter)
            known = analysis is not None and version in (f"v{analysis.live}", f"v{analysis.canary}")
            verdict = count(analysis) if analysis is not None and known else None
            self._refresh_wanting()
        if verdict is not None:
            self._events.publish(verdict)

    def _unsettled(self, analysis: CanaryAnalysis) -> bool:
        """A verdict was announced, and the canary still has its share of the traffic."""
        share, live = self._serving(analysis.adapter)
        if analysis.announced is Verdict.UNDECIDED or share is None or live is None:
            return False
        return analysis.compares(live, share)

    def _serving(self, adapter: str) -> tuple[Share | None, int | None]:
        """The canary in the registry, and the live version."""
        if adapter not in self._registry:
            return None, None
        live = self._registry.live(adapter)
        return self._registry.canary(adapter), live.version if live else None

    def _refresh_wanting(self) -> None:
        self._wanting_logprobs = frozenset(
            adapter for adapter, analysis in self._analyses.items() if analysis.wants_logprobs
        )

    def _current(self, adapter: str) -> CanaryAnalysis | None:
        """The analysis of the adapter's canary, begun now if need be; ended if there is no canary any more."""
        share, live = self._serving(adapter)
        if share is None or live is None or live == share.adapter.version or not 0 < share.weight < 1:
            self._analyses.pop(adapter, None)
            return None
        analysis = self._analyses.get(adapter)
        if analysis is None or not analysis.compares(live, share):
            checks = HARM_CHECKS if self._tries.is_candidate(adapter, share.adapter.version) else CHECKS
            alpha = min(self._golden.alpha(adapter), self._tries.alpha(adapter))
            alpha *= self._tries.begin(adapter, live, share.adapter.version)
            analysis = CanaryAnalysis(adapter, live, share, alpha, self._seed, checks)
            self._analyses[adapter] = analysis
        elif analysis.comparison.weight != share.weight:
            analysis.comparison.set_weight(share.weight)
        return analysis

    # The file

    def _read(self) -> list[CanaryAnalysis]:
        file = self._folder / FILE
        if not file.exists():
            return []
        try:
            with np.load(file, allow_pickle=False) as loaded:
                arrays = {name: loaded[name] for name in loaded.files}
            states: dict[str, dict[str, NDArray]] = {}
            for name, array in arrays.items():
                number, _, key = name.partition("/")
                states.setdefault(number, {})[key] = array
            return [CanaryAnalysis.from_state(state) for state in states.values()]
        except (OSError, ValueError, KeyError, BadZipFile) as error:
            log.warning("the comparisons of canaries with the live versions begin anew: %s", error)
            return []

    def _write(self, states: Sequence[Mapping[str, NDArray]]) -> None:
        packed = io.BytesIO()
        arrays = {f"{i}/{name}": array for i, state in enumerate(states) for name, array in state.items()}
        np.savez(packed, allow_pickle=False, **arrays)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_whole(self._folder / FILE, packed.getvalue())
        except OSError as error:
            log.error("the comparisons of canaries with the live versions were not written: %s", error.strerror)
