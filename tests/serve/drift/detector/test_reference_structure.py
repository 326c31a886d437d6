"""Requests that time makes alike raise no alarm by themselves, and real changes among them do."""

from __future__ import annotations

import numpy as np
import pytest

from serve.drift.baseline import Signal
from serve.drift.detector.detector import Drift
from serve.drift.detector.reference_structure import autocorrelation_time, block_length, fit, wandering
from serve.drift.features.features import LOGPROB, OUTPUT, PROMPT
from tests.support.time_streams import (
    NAMES,
    REFERENCE,
    autoregression,
    noise,
    of_scores,
    sessions,
    signal_of_scores,
    synthetic,
    wave,
)

# `make drift-time` counts alarms in 100 streams of 20,000 requests of every kind.
STREAMS, ROWS = 2, 3000
SHORT = (
    "wave 0.6 sd, 1 cycles",
    "wave 1.0 sd, 3 cycles",
    "AR(1) 0.5",
    "sessions 1.0 sd",
    "AR(1) 0.3 and wave 0.6 sd, 1 cycles",
    "sessions 1.0 sd and wave 1.0 sd, 1 cycles",
)


@pytest.fixture(autouse=True)
def rows_of_scores():
    with of_scores():
        yield


def watching(rows, seed=0):
    """A signal whose reference the first rows are."""
    return signal_of_scores(rows[:REFERENCE], seed)


def alarm(signal, rows):
    """After how many rows it alarms; None if it does not."""
    return next((i for i, row in enumerate(rows, 1) if signal.update(row)), None)


@pytest.mark.parametrize("kind", SHORT)
def test_what_time_does_to_requests_is_no_alarm(kind):
    for seed in range(STREAMS):
        rows = synthetic()[kind](np.random.default_rng(seed), REFERENCE + ROWS)
        signal = watching(rows, seed)
        assert alarm(signal, rows[REFERENCE:]) is None
        assert not signal.drifted, f"ln evidence {signal.log_evidence}"


@pytest.mark.parametrize("heavy", [False, True])
def test_a_reference_of_independent_requests_changes_nothing(heavy):
    for seed in range(5):
        rows = noise(np.random.default_rng(seed), REFERENCE, heavy).astype(np.float32)
        scale, structure, reference = fit(PROMPT, rows)
        assert structure.exchangeable and structure.autocorrelation == 1 and structure.block == 1
        assert np.array_equal(reference, [scale(row) for row in rows[1::2]])
        row = scale(rows[0])
        assert structure.unit(row) is row


def test_flags_and_constants_are_no_structure():
    rng = np.random.default_rng(1)
    rows = np.concatenate((rng.random((1000, 2)) < 0.05, np.ones((1000, 1)), rng.poisson(1, (1000, 2))), axis=1)
    assert autocorrelation_time(rows) == 1
    assert not wandering(rows, rng).any()
    assert autocorrelation_time(np.ones((1000, 3))) == 1


@pytest.mark.parametrize(
    ("make", "tau"),
    [
        (lambda rng: autoregression(rng, 1000, 0.1), 1.22),
        (lambda rng: autoregression(rng, 1000, 0.3), 1.86),
        (lambda rng: autoregression(rng, 1000, 0.5), 3.0),
        (lambda rng: autoregression(rng, 1000, 0.5, heavy=True), 3.0),
        (lambda rng: sessions(rng, 1000, 1.0), 3.5),
        (lambda rng: sessions(rng, 1000, 1.0) + wave(rng, 1000, 1.0, 1.0), 3.5),
    ],
    ids=["AR 0.1", "AR 0.3", "AR 0.5", "AR 0.5 heavy", "sessions", "sessions on a wave"],
)
def test_the_autocorrelation_time_is_estimated(make, tau):
    estimates = [autocorrelation_time(make(np.random.default_rng(seed))) for seed in range(5)]
    # Those scores that look dependent count more: rather too long than too short.
    assert 0.85 * tau <= np.mean(estimates) <= 1.25 * tau
    assert all(block_length(estimate, 1000) >= 2 * estimate for estimate in estimates)


def test_one_score_among_many_is_enough_for_blocks():
    rng = np.random.default_rng(2)
    rows = noise(rng, 1000)
    rows[:, 3] = autoregression(rng, 1000, 0.5)[:, 0]
    assert autocorrelation_time(rows) == pytest.approx(3.0, rel=0.3)


def test_a_slow_wave_is_wander_and_not_dependence():
    for seed in range(5):
        rng = np.random.default_rng(seed)
        slow = wave(rng, 1000, 1.0, 1.0)
        rows = noise(rng, 1000) + slow
        assert autocorrelation_time(rows) < 1.3
        wanders = wandering(rows, rng)
        assert wanders[slow.any(axis=0)].all() and wanders.sum() <= 8


def test_a_score_goes_with_one_that_wanders_and_that_it_is_correlated_with():
    """What moves one of two surprises slowly moves the other, however little of it the reference shows."""
    rng = np.random.default_rng(0)
    rows = noise(rng, 1000)
    rows[:, 1] = 0.8 * rows[:, 0] + 0.6 * rows[:, 1]
    rows[:, 0] += np.sin(np.linspace(0, 2 * np.pi, 1000))
    wanders = wandering(rows, rng)
    assert wanders[:2].all() and wanders.sum() <= 4


def test_blocks_are_short_enough_for_the_reference():
    assert block_length(1.0, 1000) == 1
    assert block_length(40.0, 1000) == 50
    assert block_length(3.0, 100) == 5


@pytest.mark.parametrize("cycles", [1.0, 1.5, 3.0])
def test_a_score_is_ranked_alike_at_every_phase_of_its_wave(cycles):
    """Also where the wave is in the shares of two topics, far from one another."""
    rng = np.random.default_rng(3)
    n = 8000
    phase = 2 * np.pi * cycles * np.arange(n) / REFERENCE
    rows = noise(rng, n)
    rows[:, 0] += np.sin(phase)
    rows[:, 1] = 0.3 * rows[:, 1] + 2 * (rng.random(n) < 0.5 + 0.35 * np.sin(phase))
    scale, structure, _ = fit(PROMPT, rows[:REFERENCE])
    units = np.array([structure.unit(scale(row)) for row in rows[REFERENCE:]])
    height = np.sin(phase[REFERENCE:])
    for score in (0, 1):
        high, low = units[height > 0.8, score], units[height < -0.8, score]
        assert abs(high.mean() - low.mean()) < 0.35, f"{high.mean()} {low.mean()}"
        assert max(abs((high < x).mean() - (low < x).mean()) for x in np.linspace(-2, 2, 21)) < 0.2
    report = structure.report(NAMES)
    assert report["block"] == 1 and 0.5 < report["wander"] < 1.2
    assert report["wandering_scores"] <= 5 and "not seen" in report["promise"]


def test_a_level_beyond_all_of_the_reference_counts():
    rng = np.random.default_rng(4)
    rows = noise(rng, 3000)
    rows[:, 0] += np.sin(2 * np.pi * np.arange(3000) / REFERENCE)
    rows[1500:, 0] += 3
    signal = watching(rows)
    assert alarm(signal, rows[REFERENCE:1500]) is None
    assert alarm(signal, rows[1500:]) < 250
    assert signal.movers(1)[0][0] == NAMES[0]


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_other_scores_stay_sharp_beside_one_that_wanders(strength):
    delays = []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        rows = noise(rng, 3000)
        rows[:, 0] += strength * np.sin(2 * np.pi * np.arange(3000) / REFERENCE)
        rows[1500:, 1:12] += 1
        signal = watching(rows, seed)
        assert alarm(signal, rows[REFERENCE:1500]) is None
        delays.append(alarm(signal, rows[1500:]))
        assert signal.structure()["wandering_scores"] >= (strength > 0)
    print(f"wave of {strength}: {delays}")
    assert np.median(delays) <= 60


@pytest.mark.parametrize("make", [lambda rng, n: autoregression(rng, n, 0.3), lambda rng, n: sessions(rng, n, 1.0)])
def test_a_change_among_dependent_requests_is_found(make):
    rows = make(np.random.default_rng(5), 3000)
    rows[1500:, :12] += 1.5
    signal = watching(rows)
    assert signal.structure()["block"] > 1
    assert alarm(signal, rows[REFERENCE:1500]) is None
    assert alarm(signal, rows[1500:]) < 500
    assert signal.changed_at <= 500 + 3 * signal.structure()["block"], "of two dozen blocks no day is told exactly"


@pytest.mark.parametrize("kind", ["i.i.d.", "wave 1.0 sd, 1 cycles", "sessions 1.0 sd and wave 1.0 sd, 1 cycles"])
def test_a_restored_signal_goes_on_bit_for_bit(kind):
    rows = synthetic()[kind](np.random.default_rng(6), 1800)
    signal = watching(rows)
    for row in rows[1000:1207]:
        signal.update(row)
    twin = Signal(PROMPT, dimensions=0)
    twin.restore(signal.state())
    assert twin.structure() == signal.structure()
    for row in rows[1207:]:
        assert signal.update(row) == twin.update(row)
    ours, theirs = signal.state(), twin.state()
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_a_reference_that_gathers_or_is_small_promises_nothing():
    assert Signal(PROMPT, needed=50).structure() == {}
    signal = signal_of_scores(noise(np.random.default_rng(8), 50))
    assert "says nothing about time" in signal.structure()["promise"]


@pytest.mark.parametrize(("kind", "effect", "column"), [(OUTPUT, "refusal", 2), (LOGPROB, "logprob", 0)])
def test_an_effect_that_the_reference_showed_itself_is_none(kind, effect, column):
    """Refusals between 5 and 35 % by the time of day, or log-probabilities of a wave."""
    rng = np.random.default_rng(9)
    signal = Signal(kind, needed=REFERENCE)
    columns = {OUTPUT: 5, LOGPROB: 37}[kind]
    day = np.sin(2 * np.pi * np.arange(6000) / REFERENCE)
    effects = []
    for i in range(6000):
        row = rng.standard_normal(columns)
        row[column] = rng.random() < 0.2 + 0.15 * day[i] if kind == OUTPUT else row[column] * 0.3 + 0.4 * day[i]
        assert not signal.update(row)
        effects.append(signal.effects().get(effect, 0.0))
    assert np.mean(np.abs(effects) > getattr(signal.tolerance, effect)) < 0.05


def test_a_move_within_the_margin_takes_at_least_the_threshold_to_alarm():
    """Also when it lasts, in every score that has a margin; with 99.5 % confidence, as in test_detector."""
    threshold, times = 50.0, []
    margin = np.array([0.3, 0.3, 0.0, 0.0])
    for seed in range(200):
        rng = np.random.default_rng(seed)
        detector = Drift(rng.standard_normal((200, 4)), threshold=threshold, margin=margin, seed=seed)
        moved = margin * rng.choice((-1, 1), 4)
        while detector.updates < 8 * threshold and not detector.update(rng.standard_normal(4) + moved):
            pass
        times.append(detector.updates)
    assert np.mean(times) - 2.58 * np.std(times) / np.sqrt(len(times)) >= threshold


def test_a_move_beyond_the_margin_is_found():
    rng = np.random.default_rng(1)
    detector = Drift(rng.standard_normal((500, 4)), threshold=1e5, margin=[0.3, 0.3, 0.0, 0.0], seed=1)
    rows = rng.standard_normal((400, 4)) + np.array([1.5, 0, 0, 0])
    assert next(i for i, row in enumerate(rows, 1) if detector.update(row)) < 60
    assert int(detector.evidence_by_score.argmax()) == 0
