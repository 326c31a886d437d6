"""Alarms about nothing in streams that time makes unlike, and how soon a change is an alarm there.

    python -m tests.campaigns.drift_time [--streams 100] [--rows 20000] [--only TEXT] [--finished streams.jsonl]
    python -m tests.campaigns.drift_time --delays

For each kind of stream: how many streams alarmed within `--rows` requests after a reference of 1,000, in how many the
evidence reached the threshold (1e5), and what the references showed in the median. Two hours in one process. With
`--finished` it goes on where it was stopped (`tests.campaigns.finished_streams`).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from functools import cache, partial
from typing import Any, TypeAlias

import numpy as np

from serve.drift.baseline import Signal
from serve.drift.features.features import PROMPT
from tests.campaigns.drift_delays import prompt_rows
from tests.campaigns.finished_streams import FinishedStreams, add_options, digest, interval, run_chosen
from tests.support.time_streams import (
    REFERENCE,
    SCORES,
    Draw,
    Rows,
    autoregression,
    mixed,
    noise,
    of_scores,
    sessions,
    signal_of_scores,
    synthetic,
    wave,
)

# Requests between the reference and a change.
BEFORE = 500
Change: TypeAlias = Callable[[Rows, np.random.Generator], Rows]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one stream did. alarm: the request after the reference that raised it."""

    alarm: int | None
    evidence: bool
    structure: dict
    seconds: float


def watch(rows: Rows, seed: int) -> Outcome:
    """A signal over `rows` up to its first alarm."""
    with of_scores() if rows.shape[1] == SCORES else nullcontext():
        return _watch(rows, seed)


def _watch(rows: Rows, seed: int) -> Outcome:
    if rows.shape[1] == SCORES:
        signal = signal_of_scores(rows[:REFERENCE], seed)
    else:
        signal = Signal(PROMPT, needed=REFERENCE, threshold=1e5, seed=seed)
        for row in rows[:REFERENCE]:
            signal.update(row)
    began = time.process_time()
    alarm = next((i for i, row in enumerate(rows[REFERENCE:], 1) if signal.update(row)), None)
    seconds = (time.process_time() - began) / (alarm or len(rows) - REFERENCE)
    return Outcome(alarm, signal.drifted, signal.structure(), seconds)


@cache
def kinds_of(prompts: bool) -> dict[str, Draw]:
    """prompts: also streams of real ones."""
    return synthetic() | (mixed(_rows("general"), _rows("medical")) if prompts else {})


@cache
def _rows(kind: str) -> Rows:
    return np.array(prompt_rows(kind)[:4000], np.float32)


def stream(kind: str, seed: int, *, rows: int, prompts: bool) -> dict[str, Any]:
    """What one stream of a kind did."""
    return asdict(watch(kinds_of(prompts)[kind](np.random.default_rng(seed), REFERENCE + rows), seed))


def false_alarms(finished: FinishedStreams, kinds: Iterable[str]) -> None:
    said = "alarms | at most (95 %) | evidence | tau | block | scores that wander | tolerance, sd | us a request"
    print(f"\n| stream | {said} |")
    print("|---" * 9 + "|")
    for name in kinds:
        if lines := finished.of(name):
            outcomes = [Outcome(*(line[key.name] for key in fields(Outcome))) for line in lines]
            alarms, evidence = _counts(outcomes).split(" | ")
            most = interval(sum(outcome.alarm is not None for outcome in outcomes), len(outcomes))[1]
            print(f"| {name} | {alarms} | {most:.1%} | {evidence} | {_medians(outcomes)} |")


def delays(kinds: dict[str, tuple[Draw, Change]], streams: int) -> None:
    """`kinds`: the stream, and what a change makes of its rows."""
    print("\n| stream and change | alarms | median delay | tau | block | scores that wander | tolerance, sd | us |")
    print("|---|---|---|---|---|---|---|---|")
    for name, (draw, change) in kinds.items():
        outcomes = []
        for seed in range(streams):
            rng = np.random.default_rng(seed)
            rows = draw(rng, REFERENCE + BEFORE + 3000)
            rows[REFERENCE + BEFORE :] = change(rows[REFERENCE + BEFORE :], rng)
            outcomes.append(watch(rows, seed))
        after = [outcome.alarm - BEFORE if outcome.alarm else 3000 for outcome in outcomes]
        seen = f"{sum(outcome.alarm is not None for outcome in outcomes)} of {streams} | {np.median(after):.0f}"
        print(f"| {name} | {seen} | {_medians(outcomes)} |", flush=True)


def synthetic_changes() -> dict[str, tuple[Draw, Change]]:
    direction = np.where(np.arange(SCORES) % 3 == 0, 1.0, 0.0)  # 11 of 33 scores

    def whole(rows: Rows, rng: np.random.Generator) -> Rows:
        return rows + direction

    def fifth(rows: Rows, rng: np.random.Generator) -> Rows:
        return rows + 2 * direction * (rng.random((len(rows), 1)) < 0.2)

    streams: dict[str, Draw] = {
        "i.i.d.": noise,
        "wave 1 sd, 1 cycle": lambda rng, n: noise(rng, n) + wave(rng, n, 1.0, 1.0),
        "AR(1) 0.3": lambda rng, n: autoregression(rng, n, 0.3),
        "sessions 1 sd": lambda rng, n: sessions(rng, n, 1.0),
        "sessions 1 sd and wave 1 sd": lambda rng, n: sessions(rng, n, 1.0) + wave(rng, n, 1.0, 1.0),
    }
    changes = {"11 of 33 scores by 1 sd": whole, "a fifth of the requests by 2 sd there": fifth}
    return {f"{s}; {c}": (draw, change) for s, draw in streams.items() for c, change in changes.items()}


def prompt_changes(general: Rows, foreign: dict[str, Rows]) -> dict[str, tuple[Draw, Change]]:
    """Short questions, without and with a wave of 1 sd in their length; then other prompts, on the same wave."""
    spread = general[:, 0].std()

    def plain(rng: np.random.Generator, n: int) -> Rows:
        return general[rng.integers(len(general), size=n)]

    def waved(rng: np.random.Generator, n: int) -> Rows:
        rows = plain(rng, n)
        rows[:, 0] += spread * np.sin(2 * np.pi * (np.arange(n) / REFERENCE + rng.random()))
        return rows

    def to(kind: str, share: float) -> Change:
        def change(rows: Rows, rng: np.random.Generator) -> Rows:
            moved = foreign[kind][rng.integers(len(foreign[kind]), size=len(rows))]
            return np.where(rng.random((len(rows), 1)) < share, moved, rows)

        return change

    return {
        f"prompts, {stream}; {share:.0%} {kind}": (draw, to(kind, share))
        for kind in foreign
        for share in (1.0, 0.2)
        for stream, draw in (("i.i.d.", plain), ("length on a wave of 1 sd", waved))
    }


def _counts(outcomes: list[Outcome]) -> str:
    alarms = sum(outcome.alarm is not None for outcome in outcomes)
    return f"{alarms} of {len(outcomes)} | {sum(outcome.evidence for outcome in outcomes)}"


def _medians(outcomes: list[Outcome]) -> str:
    shown = {"autocorrelation": ".2f", "block": ".0f", "wandering_scores": ".0f", "wander": ".2f"}
    medians = [f"{np.median([o.structure[key] for o in outcomes]):{form}}" for key, form in shown.items()]
    return " | ".join([*medians, f"{1e6 * np.median([o.seconds for o in outcomes]):.0f}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, streams=100)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--only", default="", help="kinds whose name contains this")
    parser.add_argument("--no-prompts", action="store_true", help="no real prompts, which need a network once")
    parser.add_argument("--delays", action="store_true", help="only how soon changes are seen")
    options = parser.parse_args()
    if options.delays:
        changes = synthetic_changes()
        if not options.no_prompts:
            changes |= prompt_changes(_rows("general"), {kind: _rows(kind) for kind in ("german", "medical")})
        delays({name: both for name, both in changes.items() if options.only in name}, min(options.streams, 24))
        return
    names = [name for name in kinds_of(not options.no_prompts) if options.only in name]
    files = ("serve/drift", "tests/campaigns/drift_time.py", "tests/support/time_streams.py")
    code = digest(*files, rows=options.rows)
    finished = FinishedStreams(options.finished, code)
    run_chosen(finished, names, partial(stream, rows=options.rows, prompts=not options.no_prompts), options)
    false_alarms(finished, names)


if __name__ == "__main__":
    main()
