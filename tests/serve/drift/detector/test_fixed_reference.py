"""What stays changed stays evident, and what stays as it was raises no more false alarms than is promised."""

from __future__ import annotations

import math

import numpy as np
import pytest

from serve.drift.detector.fixed_reference import FixedReference, Kind

KINDS = {"refusal": Kind.SHARE, "loop": Kind.SHARE, "longer": Kind.RANK, "shorter": Kind.LOW_RANK}
LN = math.log(1e5)


def answers(rng, count, *, refusal=0.01, loop=0.005, factor=1.0):
    """Facts of independent answers."""
    for _ in range(count):
        length = math.log(factor) + rng.normal(5, 0.5)
        facts = {"refusal": float(rng.random() < refusal), "loop": float(rng.random() < loop)}
        yield facts | {"longer": length, "shorter": length}


def watching(rng, needed=1000, **usual):
    reference = FixedReference(KINDS, needed)
    for facts in answers(rng, needed, **usual):
        reference.update(facts, 0.0)
    assert reference.watching and reference.gathered == needed
    return reference


def delay(reference, stream, threshold=LN):
    for i, facts in enumerate(stream, 1):
        reference.update(facts, float(i))
        if reference.moved(threshold):
            return i
    return None


@pytest.mark.parametrize(
    ("change", "name", "within"),
    [
        ({"refusal": 0.06}, "refusal", 300),
        ({"refusal": 0.11}, "refusal", 120),
        ({"loop": 0.055}, "loop", 400),
        ({"factor": 0.75}, "shorter", 150),
        ({"factor": 1.4}, "longer", 150),
    ],
)
def test_a_lasting_change_of_answers_is_seen(change, name, within):
    delays = []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        reference = watching(rng)
        delays.append(delay(reference, answers(rng, 1500, **change)) or 1500)
        first, *_ = reference.moved(LN)
        assert first.name == name and first.count <= delays[-1] + 20
    assert np.median(delays) <= within, delays


def test_evidence_of_a_rise_that_stays_does_not_fall_again():
    rng = np.random.default_rng(0)
    reference = watching(rng)
    delay(reference, answers(rng, 600, refusal=0.06))
    before = reference.log_evidence
    delay(reference, answers(rng, 600, refusal=0.06), math.inf)
    assert reference.log_evidence > before


@pytest.mark.parametrize("share", [0.003, 0.05, 0.3])
@pytest.mark.parametrize("needed", [150, 1000])
def test_a_false_alarm_of_a_share_takes_at_least_the_threshold_in_the_mean_whatever_it_is(share, needed):
    """Each stream is a number of its own. Streams end at some thresholds: that only makes the mean smaller."""
    threshold, streams, most = 200, 200, 1000
    rng = np.random.default_rng(0)
    names = [f"s{i}" for i in range(streams)]
    reference = FixedReference(dict.fromkeys(names, Kind.SHARE), needed)
    came = np.full(streams, most)
    units = [dict(zip(names, row, strict=True)) for row in (rng.random((needed + most, streams)) < share).astype(float)]
    list(reference.steps(units[:needed], range(needed)))
    for now, _ in enumerate(reference.steps(units[needed:], range(most)), 1):
        came = np.minimum(came, np.where(reference.evidence >= threshold, now, most))
    assert came.mean() >= threshold, came.mean()


def test_unchanged_answers_raise_no_more_than_one_false_alarm_in_a_threshold():
    """Also where the reference is small, and its shares are estimates."""
    alarms, requests, threshold = 0, 0, 1e3
    for seed in range(8):
        rng = np.random.default_rng(seed)
        reference = watching(rng, needed=150, refusal=0.05)
        came = delay(reference, answers(rng, 1000, refusal=0.05), math.log(threshold))
        alarms += came is not None
        requests += came or 1000
    assert alarms <= requests / threshold


def test_a_change_too_small_to_matter_raises_nothing():
    rng = np.random.default_rng(1)
    reference = watching(rng, refusal=0.002)
    assert delay(reference, answers(rng, 2500, refusal=0.012)) is None


def test_a_share_that_waves_in_the_reference_may_wave_later():
    rng = np.random.default_rng(2)

    def day(count, level):
        return answers(rng, count, refusal=level)

    reference = FixedReference(KINDS, 1000)
    for i in range(10):
        for facts in day(100, 0.15 if i % 2 else 0.01):
            reference.update(facts, 0.0)
    for i in range(14):
        assert delay(reference, day(100, 0.15 if i % 2 else 0.01)) is None


def test_a_rare_share_is_watched_while_it_is_rare():
    for share, rare in ((0.01, True), (0.3, False)):
        rng, reference = np.random.default_rng(4), FixedReference({"jailbreak": Kind.RARE_SHARE}, 500)
        for _ in range(500):
            reference.update({"jailbreak": float(rng.random() < share)}, 0.0)
        came = delay(reference, ({"jailbreak": float(rng.random() < share + 0.3)} for _ in range(300)))
        assert (came is not None) == rare and (reference.log_evidence > 0) == rare


def test_several_units_at_once_are_those_units_one_by_one_to_the_bit():
    rng = np.random.default_rng(6)
    units = list(answers(rng, 400, refusal=0.05)) + list(answers(rng, 300, refusal=0.2, factor=1.3))
    units = [unit | {"loop": 1 / 3} if i % 5 == 0 else unit for i, unit in enumerate(units)]
    alone, together = FixedReference(KINDS, 300), FixedReference(KINDS, 300)
    told = []
    for i, unit in enumerate(units):
        alone.update(unit, float(i))
        told.append(alone.moved(LN))
    blocks = [range(i, min(i + 7, len(units))) for i in range(0, len(units), 7)]
    assert told == [
        together.moved(LN) for block in blocks for _ in together.steps([units[i] for i in block], [*map(float, block)])
    ]
    assert any(told)
    for name, kept in alone.state().items():
        assert np.array_equal(kept, together.state()[name]), name


def test_what_is_not_known_of_an_answer_is_left_out():
    reference = FixedReference(KINDS, 10)
    for _ in range(10):
        reference.update({"refusal": None, "longer": 3.0, "shorter": math.nan}, 0.0)
    assert reference.watching and reference.gathered == 0
    reference.update({}, 1.0)
    assert reference.log_evidence == -math.inf or reference.log_evidence <= 0


def test_it_goes_on_after_a_restart_and_begins_again_when_it_is_told_to():
    rng = np.random.default_rng(3)
    reference = watching(rng)
    delay(reference, answers(rng, 300, refusal=0.08))
    again = FixedReference(KINDS, 7)
    again.restore(reference.state())
    assert again.log_evidence == reference.log_evidence and again.needed == 1000
    assert again.moved(LN) == reference.moved(LN)
    half = FixedReference(KINDS, 1000)
    for facts in answers(rng, 300):
        half.update(facts, 0.0)
    again.restore(half.state())
    assert again.gathered == 300
    reference.reset()
    assert reference.log_evidence == -math.inf and not reference.moved(LN)
    other = FixedReference({"refusal": Kind.SHARE}, 5)
    other.restore(half.state())
    assert other.gathered == 0 and other.needed == 5


def test_what_is_missing_leaves_the_evidence_of_its_number_as_it_is():
    rng = np.random.default_rng(3)
    reference = watching(rng)
    loop = list(KINDS).index("loop")
    for now, unit in enumerate(answers(rng, 300, refusal=0.1, loop=0.1, factor=1.5)):
        before = reference.state()
        missing = now % 3 == 0
        reference.update(unit | {"loop": None} if missing else unit, float(now))
        after = reference.state()
        runs = [(state["runs.r"].reshape(len(KINDS), -1), state["totals"].T) for state in (before, after)]
        assert all((then[loop] == then_after[loop]).all() for then, then_after in zip(*runs, strict=True)) == missing
        # As it is defined: what is there is multiplied by what is bet on it.
        units, _, total = before["totals"][:, 0]
        expected = (before["sum"][0] + total + 0.5) / (before["units"][0] + units + 1)
        stakes = np.maximum(before["higher"][0] - expected, 0) / (expected * (1 - expected))
        run = (runs[0][0][0] + (stakes > 0)) * (1 + stakes * (unit["refusal"] - expected))
        assert np.allclose(runs[1][0][0], run)
    assert reference.log_evidence > 0
