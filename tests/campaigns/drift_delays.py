"""How many requests a change takes until it is seen, here and with two usual methods, at equal false alarms.

    python -m tests.campaigns.drift_delays [--texts tuned] [--streams 24] [--null 100] [--only news]
    python -m tests.campaigns.drift_delays --unchanged 4

The scores were tuned on the texts `tuned`, the directions of mean rows and when effects are looked for on
`learned`, German and finance, what mean rows are made of on `mixtures` (stories and privacy policies among them);
nothing else was on `reported` and `fresh`, which docs/benchmarks.md shows. A stream is a
reference of 1,000 prompts, 300 more of the same kind, and then the change. First comes what an operator meets: the
requests until the evidence reaches 100,000, and until the alarm (evidence and effect). Then every method looks at
the same scores (the last one at mean rows) and has the threshold that 1 in 20 streams of 2,000 unchanged requests
reach. `--null 0` leaves them out and ends with the alarm. `--unchanged` has so many streams of 20,000 independent draws
of each of ten kinds of texts, and says which of them raise an alarm.

MEWMA: multivariate exponentially weighted moving average (Lowry et al., Technometrics, 1992), with the mean and the
covariance of the reference. MMD: maximum mean discrepancy between the reference and the last 100 requests (Gretton et
al., JMLR, 2012), over 256 random Fourier features (Rahimi and Recht, 2007) with the median distance as bandwidth.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from serve.drift.features.features import prompt_row
from serve.drift.signal import Signal
from tests.campaigns.drift_streams import embedding, tokenizer
from tests.support.prompts import pool

NEEDED, BEFORE, NULL, LONG = 1000, 300, 2000, 20_000
LAMBDAS = (0.01, 0.03, 0.1)
WINDOW, FEATURES = 100, 256
OTHERS = (*(f"MEWMA {fade}" for fade in LAMBDAS), "MMD")
METHODS = ("evidence", *OTHERS, "MMD, mean rows")
MOST = 1500


@dataclass(frozen=True, slots=True)
class Change:
    """`share` of the requests are `foreign`, the others `usual` as before."""

    name: str
    usual: str
    foreign: str
    share: float


def changes(name: str, usual: str, foreign: str, *percent: int) -> list[Change]:
    return [Change(f"{name}, {each} %", usual, foreign, each / 100) for each in percent]


CHANGES = {
    "tuned": [
        *changes("German among questions", "general", "german", 100, 20, 10),
        *changes("medical exams among questions", "general", "medical", 100, 20),
        *changes("questions on finance among questions", "general", "finance", 100, 20),
        *changes("questions on health among questions", "general", "health", 100, 20),
    ],
    "reported": [
        *changes("Spanish among news", "news", "spanish", 100, 20, 10),
        *changes("privacy policies among news (far)", "news", "policies", 100, 20),
        *changes("encyclopedia among news (close)", "news", "encyclopedia", 100, 20),
        *changes("Italian among quotations", "quotations", "italian", 100, 20, 10),
        *changes("stories among quotations (far)", "quotations", "stories", 100, 20),
        *changes("news among quotations (close)", "quotations", "news", 100, 20),
    ],
    "fresh": [
        *changes("a dictionary of computing among the Jargon File (close)", "jargon", "computing", 20),
        *changes("a dictionary of computing among manuals (close)", "manuals", "computing", 20),
        *changes("French manuals among manuals", "manuals", "french_manuals", 10),
        *changes("Esperanto among quotations", "quotations", "esperanto", 10),
    ],
    "learned": [
        *changes("novels among biographies (close)", "biographies", "novels", 20),
        *changes("biographies among court rulings (close)", "rulings", "biographies", 20),
        *changes("biographies among medical abstracts (far)", "abstracts", "biographies", 20),
        *changes("German among questions", "general", "german", 10),
    ],
    "mixtures": [
        *changes("novels among biographies", "biographies", "novels", 20),
        *changes("biographies among court rulings", "rulings", "biographies", 10),
        *changes("court rulings among biographies", "biographies", "rulings", 10),
        *changes("court rulings among medical abstracts", "abstracts", "rulings", 10),
        *changes("medical abstracts among biographies", "biographies", "abstracts", 10),
        *changes("medical abstracts among court rulings", "rulings", "abstracts", 10),
        *changes("questions on health among questions", "general", "health", 10),
        *changes("questions on finance among questions", "general", "finance", 10),
        *changes("stories among biographies", "biographies", "stories", 10),
        *changes("privacy policies among court rulings", "rulings", "policies", 10),
    ],
}


UNCHANGED = ("general", "news", "quotations", "manuals", "biographies", "jargon", "rulings", "computing")
UNCHANGED += ("encyclopedia", "abstracts")


@cache
def prompt_rows(kind: str) -> list[NDArray]:
    """A prompt's raw row for each text of the pool."""
    encoded = tokenizer().encode_batch(list(pool(kind)[:12_000]))
    return [prompt_row(embedding(), text.ids) for text in encoded]


@dataclass(slots=True)
class Stream:
    """What every method says after each request that is not in the reference. alarm: the request that raised it."""

    said: dict[str, NDArray]
    alarm: int | None


def stream(usual: str, foreign: str, share: float, after: int, seed: int, alone: bool = False) -> Stream:
    """A reference, BEFORE usual requests, and `after` of which `share` are foreign. alone: there are no other methods,
    and the stream ends with the alarm."""
    rng = np.random.default_rng(seed)
    ours = iter(rng.permutation(len(prompt_rows(usual))))
    theirs = iter(np.resize(rng.permutation(len(prompt_rows(foreign))), after))
    signal = Signal("prompt", needed=NEEDED, threshold=1e5, seed=seed)
    gathered = [prompt_rows(usual)[next(ours)] for _ in range(NEEDED)]
    for row in gathered:
        signal.update(row)
    means = [row[-embedding().narrow.shape[1] :] for row in gathered]
    reference = _scores(signal, gathered[1::2])  # which the scale was not fitted on
    evidence, scores, alarm = [], [], None
    for request in range(BEFORE + after):
        strange = request >= BEFORE and rng.random() < share
        row = prompt_rows(foreign)[next(theirs)] if strange else prompt_rows(usual)[next(ours)]
        # Nothing is asked of it later.
        if alarm is None and signal.update(row):
            alarm = request + 1
        evidence.append(signal.log_evidence)
        if alone:
            if alarm is not None:
                break
            continue
        scores.append(_scores(signal, [row])[0])
        means.append(row[-embedding().narrow.shape[1] :])
    if alone:
        return Stream({"evidence": np.array(evidence)}, alarm)
    live = np.array(scores)
    said = {"evidence": np.array(evidence), "MMD": mmd(reference, live, seed)}
    said |= {f"MEWMA {fade}": mewma(reference, live, fade) for fade in LAMBDAS}
    said["MMD, mean rows"] = mmd(np.array(means[:NEEDED]), np.array(means[NEEDED:]), seed)
    return Stream(said, alarm)


def _scores(signal: Signal, rows: Sequence[NDArray]) -> NDArray:
    return signal._scale(signal._parts(np.array(rows, np.float32))[0]).astype(np.float64)


def mewma(reference: NDArray, live: NDArray, fade: float) -> NDArray:
    """(n,): the statistic after each row of `live`, (n, k)."""
    centred = live - reference.mean(axis=0)
    covariance = np.cov(reference.T) + 1e-6 * np.eye(live.shape[1])
    whiten = np.linalg.inv(np.linalg.cholesky(covariance)).T
    average, out = np.zeros(live.shape[1]), np.empty(len(live))
    for i, row in enumerate(centred @ whiten):
        average += fade * (row - average)
        out[i] = average @ average / (fade / (2 - fade) * (1 - (1 - fade) ** (2 * i + 2)))
    return out


def mmd(reference: NDArray, live: NDArray, seed: int) -> NDArray:
    """(n,): the squared distance of the last WINDOW rows' mean feature from the reference's."""
    rng = np.random.default_rng(seed)
    pairs = rng.integers(len(reference), size=(2, 2000))
    width = np.median(np.linalg.norm(reference[pairs[0]] - reference[pairs[1]], axis=1))
    onto = rng.standard_normal((reference.shape[1], FEATURES)) / width
    shift = rng.uniform(0, 2 * math.pi, FEATURES)

    def features(of: NDArray) -> NDArray:
        return np.cos(of @ onto + shift) * math.sqrt(2 / FEATURES)

    known = features(reference)
    # The window begins with rows of the reference, so that it is always full.
    window = np.concatenate((known[:WINDOW], features(live))) - known.mean(axis=0)
    total = window.cumsum(axis=0)
    return (((total[WINDOW:] - total[:-WINDOW]) / WINDOW) ** 2).sum(axis=1)


def thresholds(usual: str, count: int) -> dict[str, float]:
    """What 1 in 20 unchanged streams reach with each method."""
    highest: dict[str, list[float]] = {method: [] for method in METHODS}
    alarms = 0
    for seed in range(count):
        unchanged = stream(usual, usual, 0.0, NULL - BEFORE, 10_000 + seed)
        alarms += unchanged.alarm is not None
        for method in METHODS:
            highest[method].append(float(unchanged.said[method].max()))
    found = {method: float(np.quantile(values, 0.95)) for method, values in highest.items()}
    reached = sum(value >= math.log(1e5) for value in highest["evidence"])
    print(f"{usual}: {count} unchanged streams of {NULL}: {reached} reach 100,000, {alarms} alarm; thresholds {found}")
    return found


def delays(change: Change, streams: int, limits: dict[str, float]) -> dict[str, list[float]]:
    """Requests after the change until each method sees it, and until the evidence is 100,000 and the alarm is there."""
    out: dict[str, list[float]] = {name: [] for name in ("c = 1e5", "alarm", *limits)}
    for seed in range(streams):
        after = 600 if change.share == 1 else MOST
        changed = stream(change.usual, change.foreign, change.share, after, seed, alone=not limits)
        for method in limits:
            out[method].append(_first(changed.said[method][BEFORE:], limits[method]))
        out["c = 1e5"].append(_first(changed.said["evidence"][BEFORE:], math.log(1e5)))
        out["alarm"].append(math.inf if changed.alarm is None else changed.alarm - BEFORE)
    return out


def unchanged(kinds: Sequence[str], streams: int) -> Iterator[str]:
    """A line for each kind of texts: how many streams reach 100,000, the highest evidence, and how many alarm."""
    yield "| texts | streams | c = 1e5 | highest evidence | alarm |\n|---|---|---|---|---|"
    for kind in kinds:
        highest, alarms = [], 0
        for seed in range(streams):
            evidence, alarmed = unchanged_stream(kind, 5000 + seed)
            highest.append(evidence)
            alarms += alarmed
        reached = sum(evidence >= math.log(1e5) for evidence in highest)
        yield f"| {kind} | {streams} | {reached} | {math.exp(max(highest)):,.0f} | {alarms} |"


def unchanged_stream(kind: str, seed: int) -> tuple[float, bool]:
    """The highest ln evidence of LONG independent draws after the reference, and whether they raised an alarm."""
    rng = np.random.default_rng(seed)
    signal = Signal("prompt", needed=NEEDED, threshold=1e5, seed=seed)
    rows, highest, alarmed = prompt_rows(kind), -math.inf, False
    for block in rng.integers(len(rows), size=(NEEDED + LONG)).reshape(-1, 8):
        for alarms in signal.steps([rows[i] for i in block]):
            highest, alarmed = max(highest, signal.log_evidence), alarmed or alarms
    return highest, alarmed


def _first(values: NDArray, limit: float) -> float:
    reached = np.flatnonzero(values >= limit)
    return float(reached[0] + 1) if len(reached) else math.inf


def _median(values: list[float]) -> str:
    median, seen = float(np.median(values)), sum(map(math.isfinite, values))
    return f"{median:.0f}" if math.isfinite(median) else f"{seen} of {len(values)}"


def table(chosen: list[Change], streams: int, null: int) -> Iterator[str]:
    """The lines of both tables; without unchanged streams only when the alarms come."""
    if not null:
        yield "| change | c = 1e5 | alarm |\n|---|---|---|"
        for change in chosen:
            cells = [_median(values) for values in delays(change, streams, {}).values()]
            yield f"| {change.name} | " + " | ".join(cells) + " |"
        return
    limits = {usual: thresholds(usual, null) for usual in dict.fromkeys(change.usual for change in chosen)}
    yield "| change | c = 1e5 | alarm | " + " | ".join(METHODS) + " | ratio to the best other |"
    yield "|---" * (len(METHODS) + 4) + "|"
    for change in chosen:
        seen = delays(change, streams, limits[change.usual])
        medians = {method: float(np.median(seen[method])) for method in METHODS}
        best = min(medians[method] for method in METHODS[1:])
        ratio = medians["evidence"] / best if math.isfinite(best) else 0.0
        cells = [_median(values) for values in seen.values()]
        yield f"| {change.name} | " + " | ".join(cells) + f" | {ratio:.2f} |"


def main(show: Callable[..., None] = print) -> None:
    options = argparse.ArgumentParser(description="requests until a change is seen")
    options.add_argument("--texts", choices=sorted(CHANGES), default="reported")
    options.add_argument("--streams", type=int, default=24)
    options.add_argument("--null", type=int, default=100)
    options.add_argument("--only", default="", help="changes whose name this pattern is found in")
    options.add_argument("--unchanged", type=int, default=0, help="streams of each kind of texts, instead of changes")
    chosen = options.parse_args()
    if chosen.unchanged:
        for line in unchanged([kind for kind in UNCHANGED if re.search(chosen.only, kind)], chosen.unchanged):
            show(line, flush=True)
        return
    changes = [change for change in CHANGES[chosen.texts] if re.search(chosen.only, change.name)]
    for line in table(changes, chosen.streams, chosen.null):
        show(line, flush=True)


if __name__ == "__main__":
    main()
