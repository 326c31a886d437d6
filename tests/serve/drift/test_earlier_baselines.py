"""What an earlier release wrote goes on: no version is unwatched after an upgrade."""

from __future__ import annotations

import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from serve.drift.baseline import Baseline, Provenance, Tolerance
from serve.drift.earlier_baselines import current
from serve.drift.features.features import FEATURES, FOLLOW_UP, LOGPROB, OUTPUT, PROMPT
from serve.drift.features.token_surprise import NAMES, sketch
from serve.drift.signal import Signal

# Written by the last release whose scores were vectors too: each signal has a reference of 100 and 60 rows more, that
# of follow-ups 30 rows of its reference. Its rows are those of `rows` below.
WRITTEN = Path(__file__).parents[2] / "fixtures" / "baseline-features-4.zip"
DIMENSIONS = 6
MINE = Provenance("acme/tone", "1a7b88586afe", embedding="e" * 64, tokenizer="t" * 64, seed=5, dimensions=DIMENSIONS)


def rows(rng, *, language=0, longer=0.0, logprob=-1.0):
    tokens = rng.zipf(1.4, rng.integers(5, 40)) % 500 + 1000 * language
    prompt = np.concatenate(([np.log1p(len(tokens))], rng.standard_normal(DIMENSIONS)))
    answer = rng.zipf(1.4, rng.integers(5, 40)) % 500
    flags = (rng.random() < 0.1, rng.random() < 0.02, 0.9, 0.95 + 0.01 * rng.standard_normal())
    length = np.log1p(len(answer)) + longer
    stats = (logprob + 0.3 * rng.standard_normal(), -5 + rng.standard_normal(), 1 + 0.1 * rng.standard_normal(), length)
    return {
        PROMPT: np.concatenate((prompt, sketch(tokens), rng.standard_normal(24))),
        OUTPUT: np.concatenate(((length, *flags), sketch(answer))),
        LOGPROB: np.concatenate((stats, prompt)),
    }


@pytest.fixture
def upgraded(tmp_path):
    with zipfile.ZipFile(WRITTEN) as packed:
        packed.extractall(tmp_path / "tone")
    baseline = Baseline.load(tmp_path / "tone", MINE)
    baseline.configure(threshold=1e4, tolerance=Tolerance())
    return baseline


def test_every_reference_goes_on_with_the_scores_that_are_left(upgraded):
    for kind, names in ((PROMPT, ("length", *NAMES)), (LOGPROB, ("mean_logprob", "min_logprob", "sd_logprob"))):
        signal = upgraded.signals[kind]
        assert signal.watching and signal.names == names and (signal.samples, signal.gathered) == (60, 100)
    assert upgraded.signals[OUTPUT].names[-2:] == NAMES and len(upgraded.signals[OUTPUT].names) == 7
    assert upgraded.signals[FOLLOW_UP].gathered == 30
    rng = np.random.default_rng(3)
    for _ in range(150):
        assert not any(upgraded.signals[kind].update(row) for kind, row in rows(rng).items())
    assert upgraded.signals[PROMPT].samples == 210


@pytest.mark.parametrize(
    ("kind", "change"), [(PROMPT, {"language": 1}), (OUTPUT, {"longer": 2.0}), (LOGPROB, {"logprob": -2.0})]
)
def test_a_change_right_after_an_upgrade_is_seen(upgraded, kind, change):
    rng = np.random.default_rng(4)
    assert any(upgraded.signals[kind].update(rows(rng, **change)[kind]) for _ in range(60))


def test_what_is_saved_is_of_this_release_and_the_next_version_inherits_it(upgraded, tmp_path):
    upgraded.save(tmp_path / "again")
    again = Baseline.load(tmp_path / "again", MINE)
    assert again.provenance.features == FEATURES
    ours, theirs = upgraded.signals[PROMPT].state(), again.signals[PROMPT].state()
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)
    assert again.successor(replace(MINE, version="2" * 12)).signals[PROMPT].watching


def before_fixed_bets(state):
    """As a release wrote it that had neither fixed bets nor margins, nor looked at time, nor at the size of effects."""
    gone = ("detector.effect.", "structure.", "detector.margin", "detector.weights", "detector.rows", "detector.stages")
    state = {
        name: value for name, value in state.items() if not name.startswith(gone) and name not in ("rows", "usual")
    }
    histograms = len(state["detector.bank.unit"])
    for name in ("r", "page", "start"):
        state[f"detector.bank.{name}"] = state[f"detector.bank.{name}"][:histograms]
    return state | {"counts": state["counts"][:5]}


def test_a_signal_of_the_first_releases_goes_on_too():
    with (
        zipfile.ZipFile(WRITTEN) as packed,
        packed.open(next(n for n in packed.namelist() if n.endswith("npz"))) as file,
    ):
        arrays = {name: value for name, value in np.load(file).items() if name.startswith(f"{PROMPT}/")}
    state = before_fixed_bets({name.removeprefix(f"{PROMPT}/"): value for name, value in arrays.items()})
    signal = Signal(PROMPT, dimensions=DIMENSIONS)
    signal.restore(state)
    evidence = state["detector.bank.r"].reshape(-1, 3).mean(axis=1)
    assert np.allclose(np.exp(signal._detector.evidence_by_score), evidence[[0, DIMENSIONS + 1, DIMENSIONS + 2]])
    assert signal.samples == 60 and len(signal.changed_rows()) == 0
    rng = np.random.default_rng(5)
    assert any(signal.update(rows(rng, language=1)[PROMPT]) for _ in range(60))
    assert current(PROMPT, signal.state(), DIMENSIONS).keys() == signal.state().keys()
