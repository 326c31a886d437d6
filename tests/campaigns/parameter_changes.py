"""Requests that begin to ask for other parameters, of a version that answers as before: how often that is an alarm.

Streams of 20,000 requests each. `max_tokens` goes from 8 to 4 after a quarter of them, and to 64 after half; the
temperature goes from 0.7 to 0 after three quarters, and to 1 in the last eighth. Answers are drawn from the same
distribution throughout.
`--blind` hides the parameters from the watcher, as before there were strata.

    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python -m tests.campaigns.parameter_changes [--finished streams.jsonl]
"""

from __future__ import annotations

import argparse
from collections import Counter
from functools import partial
from typing import Any

from serve.asgi.exchange import Parameters
from serve.drift.baseline import Baseline, Provenance
from serve.drift.watched_version import DriftSettings, WatchedVersion
from tests.campaigns.finished_streams import FinishedStreams, add_options, digest, interval, run_chosen
from tests.support.sampled_answers import DIMENSIONS, SampledAnswers

# (from this share of the stream on, the parameters)
PLAN = (
    (0.0, Parameters(8, 0.7)),
    (0.25, Parameters(4, 0.7)),
    (0.5, Parameters(64, 0.7)),
    (0.75, Parameters(64, 0.0)),
    (0.875, Parameters(64, 1.0)),
)


def stream(kind: str, seed: int, *, requests: int) -> dict[str, Any]:
    """Which signals alarmed while one stream went by, of a watcher that is `told` the parameters or is `blind`."""
    answers = SampledAnswers(seed)
    baseline = Baseline(Provenance("tone", "1", "of a test", "", seed=seed, dimensions=DIMENSIONS))
    settings = DriftSettings(interval=0, seed=seed)
    baseline.configure(threshold=settings.threshold, tolerance=settings.tolerance)
    version = WatchedVersion("tone", "v1", "tone@1", "base", baseline, settings)
    alarms: Counter[str] = Counter()
    for number in range(requests):
        parameters = [asked for share, asked in PLAN if number >= share * requests][-1]
        exchange = answers.request(parameters, told=kind == "told")
        alarms.update(alarm.signal for alarm in [*version.gather(exchange, answers.embedding), *version.count()])
    return {"requests": requests, "alarms": dict(alarms)}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(arguments, streams=100)
    arguments.add_argument("--requests", type=int, default=20_000)
    arguments.add_argument("--blind", action="store_true", help="the watcher is not told the parameters")
    options = arguments.parse_args()
    files = ("serve/drift", "tests/campaigns/parameter_changes.py", "tests/support/sampled_answers.py")
    code = digest(*files, requests=options.requests)
    finished, kind = FinishedStreams(options.finished, code), "blind" if options.blind else "told"
    run_chosen(finished, [kind], partial(stream, requests=options.requests), options)
    lines = finished.of(kind)
    alarmed = sum(bool(line["alarms"]) for line in lines)
    signals = sum((Counter(line["alarms"]) for line in lines), Counter())
    most = interval(alarmed, len(lines))[1]
    print(f"{alarmed} of {len(lines)} streams with an alarm {dict(signals)}: at most {most:.1%} (95 %)")


if __name__ == "__main__":
    main()
