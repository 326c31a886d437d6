"""Requests that begin to ask for other parameters, of a version that answers as before: how often that is an alarm.

Streams of 20,000 requests each. `max_tokens` goes from 8 to 4 after a quarter of them, and to 64 after half; the
temperature goes from 0.7 to 0 after three quarters, and to 1 in the last eighth. Answers are drawn from the same
distribution throughout.
`--blind` hides the parameters from the watcher, as before there were strata.

    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python -m tests.campaigns.parameter_changes --streams 100
"""

from __future__ import annotations

import argparse
import time
from collections import Counter

from serve.asgi.exchange import Parameters
from serve.drift.baseline import Baseline, Provenance
from serve.drift.watched_version import DriftSettings, WatchedVersion
from tests.support.sampled_answers import DIMENSIONS, SampledAnswers

# (from this share of the stream on, the parameters)
PLAN = (
    (0.0, Parameters(8, 0.7)),
    (0.25, Parameters(4, 0.7)),
    (0.5, Parameters(64, 0.7)),
    (0.75, Parameters(64, 0.0)),
    (0.875, Parameters(64, 1.0)),
)


def stream(seed: int, requests: int, blind: bool) -> Counter[str]:
    """Which signals alarmed while one stream went by."""
    answers = SampledAnswers(seed)
    baseline = Baseline(Provenance("tone", "1", "of a test", "", seed=seed, dimensions=DIMENSIONS))
    settings = DriftSettings(interval=0, seed=seed)
    baseline.configure(threshold=settings.threshold, tolerance=settings.tolerance)
    version = WatchedVersion("tone", "v1", "tone@1", "base", baseline, settings)
    alarms: Counter[str] = Counter()
    for number in range(requests):
        parameters = [asked for share, asked in PLAN if number >= share * requests][-1]
        exchange = answers.request(parameters, told=not blind)
        alarms.update(alarm.signal for alarm in version.observe(exchange, answers.embedding))
    return alarms


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--streams", type=int, default=100)
    arguments.add_argument("--requests", type=int, default=20_000)
    arguments.add_argument("--first", type=int, default=0, help="the first seed")
    arguments.add_argument("--blind", action="store_true", help="the watcher is not told the parameters")
    options = arguments.parse_args()
    began, alarmed, signals = time.perf_counter(), 0, Counter()
    for seed in range(options.first, options.first + options.streams):
        alarms = stream(seed, options.requests, options.blind)
        alarmed += bool(alarms)
        signals += alarms
        done = seed - options.first + 1
        print(
            f"{done} streams: {alarmed} with an alarm {dict(signals)}, {time.perf_counter() - began:.0f} s", flush=True
        )


if __name__ == "__main__":
    main()
