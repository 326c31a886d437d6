"""The detector keeps its promise: few false alarms whatever the scores, and quick true ones."""

from __future__ import annotations

import os

import numpy as np
import pytest

from serve.drift.baseline import Signal
from serve.drift.detector.detector import SURE, Drift
from serve.drift.detector.effect_size import RECENT
from serve.drift.features.features import prompt_row
from serve.drift.thinning import WINDOW, Thinning
from tests.support.prompts import Unreachable, pool

# `make drift-proof` runs many more streams at higher thresholds.
STREAMS = int(os.environ.get("LORADOCK_TEST_DRIFT_STREAMS", 300))
THRESHOLD = float(os.environ.get("LORADOCK_TEST_DRIFT_THRESHOLD", 100))


def heavy(rng, n):
    return rng.standard_cauchy((n, 3)) ** 3


def discrete(rng, n):
    flag = rng.random((n, 1)) < 0.1
    return np.concatenate((rng.poisson(0.4, (n, 2)), flag, np.zeros((n, 1)), 1 - flag), axis=1)


def single(rng, n):
    """One score, for which the promise is a theorem."""
    return heavy(rng, n)[:, :1]


def correlated(rng, n):
    return rng.standard_normal((n, 8)) @ np.linspace(-1, 1, 64).reshape(8, 8) + 0.3 * rng.standard_normal((n, 8))


def skewed(rng, n):
    """Many scores of one thing, in a few discrete steps."""
    return np.round(rng.exponential(1, (n, 1)) * rng.uniform(0.5, 2, (n, 20)), 1)


def mixed(rng, n):
    far = rng.random((n, 1)) < 0.05
    return rng.standard_normal((n, 6)) + far * rng.standard_normal((n, 6)) * 50


def time_to_alarm(draw, size, seed, *, capacity=None, limit=8):
    """Requests until the alarm, or `limit` thresholds: cutting it short can only make the mean smaller."""
    rng = np.random.default_rng(seed)
    detector = Drift(draw(rng, size), threshold=THRESHOLD, capacity=capacity, seed=seed)
    while detector.updates < limit * THRESHOLD:
        if any(detector.update(row) for row in draw(rng, 64)):
            break
    return detector.updates


# Kind of stream -> draw, reference, capacity, and the requests to its first alarm about nothing, by seed.
FALSE_ALARMS = {
    "one score": (single, 3, None, (19, 186, 126, 69, 40, 62, 82, 171)),
    "heavy tails": (heavy, 40, None, (100, 340, 126, 168, 654, 292, 148, 47)),
    "discrete": (discrete, 30, None, (238, 321, 196, 184, 37, 109, 111, 224)),
    "five references": (correlated, 5, None, (20, 109, 122, 366, 78, 131, 155, 20)),
    "full bag": (correlated, 60, 60, (142, 96, 71, 134, 433, 59, 98, 41)),
    "two references": (skewed, 2, None, (75, 245, 35, 89, 208, 235, 131, 55)),
    "ties, full bag": (skewed, 500, 500, (60, 72, 96, 46, 61, 95, 121, 74)),
    "outliers, full bag": (mixed, 20, 20, (92, 198, 51, 252, 183, 123, 282, 398)),
}


@pytest.mark.skipif("LORADOCK_TEST_DRIFT_STREAMS" in os.environ, reason="the next test counts them")
@pytest.mark.parametrize("kind", FALSE_ALARMS)
def test_false_alarms_come_when_they_came_as_they_were_counted(kind):
    """`make drift-proof` counts over thousands of streams; the first eight of each kind are held to what they were.
    Another processor's sums are rounded another way, which may move one of them.
    """
    draw, size, capacity, alarms = FALSE_ALARMS[kind]
    times = [time_to_alarm(draw, size, seed, capacity=capacity) for seed in range(len(alarms))]
    assert sum(time == alarm for time, alarm in zip(times, alarms, strict=True)) >= len(alarms) - 1, times


@pytest.mark.skipif("LORADOCK_TEST_DRIFT_STREAMS" not in os.environ, reason="half a minute and more: make drift-proof")
@pytest.mark.parametrize("kind", FALSE_ALARMS)
def test_a_false_alarm_takes_at_least_the_threshold_in_the_mean(kind):
    """With 99.5 % confidence for each kind of stream: the times are skewed to the right, so that the bound is lower
    than it need be."""
    draw, size, capacity, _ = FALSE_ALARMS[kind]
    times = np.array([time_to_alarm(draw, size, seed, capacity=capacity) for seed in range(STREAMS)])
    lower = times.mean() - 2.58 * times.std() / np.sqrt(len(times))
    print(f"{kind}: mean {times.mean():.0f}, at least {lower:.0f} with 99.5 %; c = {THRESHOLD:.0f}")
    assert lower >= THRESHOLD


def rank(detector, scores):
    return detector._bags.rank(scores, [detector._bags.lots(detector._rng, 0)])[0][0, 0]


def test_ranks_are_uniform_and_independent_also_when_the_bag_forgets():
    rng = np.random.default_rng(3)
    p = []
    for seed in range(200):
        detector = Drift(rng.integers(0, 3, (4, 1)), capacity=1, seed=seed)  # the reference fills the bag
        p.append([rank(detector, rng.integers(0, 3, (1, 1)).astype(np.float32)) for _ in range(40)])
    ranks = np.array(p)
    cells = np.histogram(ranks, 10, (0, 1))[0] / ranks.size
    assert np.abs(cells - 0.1).max() < 4 * np.sqrt(0.09 / ranks.size)
    after = ranks[:, 1:][ranks[:, :-1] > 0.8]
    assert abs(after.mean() - 0.5) < 4 * np.sqrt(1 / 12 / after.size)


def test_a_shift_in_one_score_is_found_named_and_dated():
    rng = np.random.default_rng(1)
    detector = Drift(rng.standard_normal((500, 12)), threshold=1e5, seed=1)
    for row in rng.standard_normal((500, 12)):
        assert not detector.update(row)
    for row in rng.standard_normal((200, 12)) + 2 * (np.arange(12) == 7):
        if detector.update(row):
            break
    assert detector.drifted and detector.updates - 500 <= 60
    assert int(detector.evidence_by_score.argmax()) == 7
    assert abs(detector.changed_at - 500) <= 25
    assert detector.rank_shift[7] > 0.1 and np.abs(np.delete(detector.rank_shift, 7)).max() < 0.1


@pytest.mark.parametrize(("share", "shift"), [(1.0, 3.0), (0.3, 3.0), (0.1, 4.0)])
def test_the_share_of_foreign_requests_is_estimated_from_below(share, shift):
    shares = []
    for seed in range(7):
        rng = np.random.default_rng(seed)
        detector = Drift(rng.standard_normal((1000, 10)), threshold=1e5, seed=seed)
        list(detector.steps(rng.standard_normal((100, 10)), [None] * 100))
        assert detector.foreign_share is None
        rows = rng.standard_normal((1300, 10))
        rows[:, 3] += shift * (rng.random(1300) < share)
        now = next(now for now, row in enumerate(rows) if detector.update(row) and detector.sure)
        assert detector.log_evidence >= np.log(SURE * 1e5) and detector.foreign_share > 0.03
        list(detector.steps(rows[now + 1 : now + 301], [None] * 300))
        shares.append(detector.foreign_share)
    print(f"{share:.0%}: {np.median(shares):.1%}, at most {max(shares):.1%}")
    assert share / 3 < np.median(shares) <= share and max(shares) <= 1.3 * share


def test_what_the_last_release_wrote_goes_on():
    """It kept no ranks, and bets on the size of an effect; what is promised is in bags and bets."""
    rng = np.random.default_rng(4)
    detector = Drift(rng.standard_normal((300, 4)), threshold=1e4, seed=1)
    list(detector.steps(rng.standard_normal((200, 4)), [None] * 200))
    state = detector.state()
    del state["ranks"]
    older = {"shift": np.zeros(4), "seen": np.ones(2), "margin": np.zeros(4), "effect.total": np.ones(1)}
    again = Drift.from_state(state | older | {"rows": np.zeros((64, 4)), "stages": np.array([True, False])})
    for row in rng.standard_normal((400, 4)) + 2:
        assert detector.update(row) == again.update(row) and detector.log_evidence == again.log_evidence
    assert again.sure and again.foreign_share > 0.5


@pytest.mark.parametrize("updates", [0, 1, 1203])
def test_a_restored_detector_goes_on_bit_for_bit(updates, tmp_path):
    rng = np.random.default_rng(5)
    detector = Drift(rng.standard_normal((900, 5)), capacity=1000, seed=9)
    for row in rng.standard_normal((updates, 5)):
        detector.update(row)
    np.savez(tmp_path / "state.npz", allow_pickle=False, **detector.state())
    with np.load(tmp_path / "state.npz", allow_pickle=False) as state:
        twin = Drift.from_state(state)
    for row in rng.standard_normal((300, 5)) + 0.2:
        assert detector.update(row) == twin.update(row)
        assert detector.log_evidence == twin.log_evidence
    ours, theirs = detector.state(), twin.state()
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("draw", [discrete, heavy])
def test_several_rows_at_once_are_those_rows_one_by_one_to_the_bit(draw):
    rng = np.random.default_rng(8)
    known = {"seed": 3, "capacity": 1000, "threshold": 1e3}
    reference, rows = draw(rng, 990), draw(rng, 120)  # the bags fill on the way
    rows[70:] += 1 if draw is discrete else 99  # the evidence is there within a block
    known["margin"] = np.where(np.arange(reference.shape[1]) == 1, 0.5, 0)
    alone, together = Drift(reference, **known), Drift(reference, **known)
    one_by_one = [alone.update(row) for row in rows]
    blocks = [rows[i : i + 8] for i in range(0, len(rows), 8)]
    assert [drifted for block in blocks for drifted in together.steps(block, [None] * len(block))] == one_by_one
    assert one_by_one[-1] and not one_by_one[0]
    left, right = alone.state(), together.state()
    assert left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


def test_memory_ends_at_the_capacity():
    rng = np.random.default_rng(6)
    detector = Drift(rng.standard_normal((100, 3)), capacity=150, seed=1)
    for row in rng.standard_normal((RECENT, 3)):
        detector.update(row)
    full = sum(array.nbytes for array in detector.state().values())
    for row in rng.standard_normal((500, 3)):
        detector.update(row)
    assert sum(array.nbytes for array in detector.state().values()) == full


def test_what_is_no_row_is_refused_in_a_sentence():
    detector = Drift(np.zeros((3, 2)))
    with pytest.raises(ValueError, match="2 scores a row"):
        detector.update([1.0])
    with pytest.raises(ValueError, match="not a finite number"):
        detector.update([1.0, float("nan")])
    with pytest.raises(ValueError, match="shape"):
        Drift(np.zeros((0, 2)))
    assert detector.updates == 0


# Real prompts: DRIFT's table. Medians are held to it within 25 %.

# (kind, share of the traffic): requests to detection at c = 1e4 and 1e5
MEASURED = {
    ("medical", 1.0): (46, 51),
    ("finance", 1.0): (44, 56),
    ("code", 1.0): (22, 27),
    ("german", 1.0): (23, 28),
    ("medical", 0.2): (338, 454),
    ("german", 0.2): (131, 160),
    ("medical", 0.1): (1068, 1482),
    ("german", 0.1): (285, 448),
}
LONG = "LORADOCK_TEST_DRIFT_STREAMS" in os.environ
TESTED = MEASURED if LONG else {key: MEASURED[key] for key in (("medical", 1.0), ("german", 1.0), ("german", 0.2))}
DELAY_STREAMS = 24 if LONG else 3


@pytest.fixture(scope="module")
def rows(small_checkpoint):
    """rows(kind): a raw row for each prompt of the pool."""
    from tokenizers import Tokenizer

    from serve.drift.features.embedding import Embedding

    tokenizer = Tokenizer.from_file(str(small_checkpoint / "tokenizer.json"))
    embedding = Embedding.of(small_checkpoint)
    made = {}

    def of(kind):
        if kind not in made:
            try:
                prompts = pool(kind)[: 6000 if LONG else 3500]
            except Unreachable as missing:
                pytest.skip(str(missing))
            encoded = tokenizer.encode_batch(list(prompts))
            made[kind] = [(prompt_row(embedding, text.ids), text.ids) for text in encoded]
        return made[kind]

    return of


@pytest.fixture(scope="module")
def small_checkpoint():
    """The embedded model, for its tokenizer and its embedding table."""
    from serve.errors import LoradockError
    from serve.models.embedded import ensure

    try:
        return ensure("smollm2")
    except LoradockError as missing:
        pytest.skip(str(missing))


@pytest.mark.parametrize(("kind", "share"), TESTED, ids=lambda value: str(value))
def test_foreign_prompts_are_found_as_fast_as_was_measured(rows, kind, share):
    delays = np.array([detection(rows("general"), rows(kind), share, seed) for seed in range(DELAY_STREAMS)])
    found = np.median(delays, axis=0)
    print(f"{kind} {share:.0%}: {found[0]:.0f} at c = 1e4, {found[1]:.0f} at 1e5; DRIFT {TESTED[kind, share]}")
    assert (found <= 1.25 * np.array(TESTED[kind, share])).all()


def detection(general, foreign, share, seed, *, needed=1000, before=300):
    """Requests after the change until the evidence is 1e4 and 1e5."""
    rng = np.random.default_rng(seed)
    ours, theirs = iter(rng.permutation(len(general))), iter(np.resize(rng.permutation(len(foreign)), 10_000))
    signal = Signal("prompt", needed=needed, threshold=1e9, seed=seed)
    for _ in range(needed + before):
        signal.update(general[next(ours)][0])
    found = []
    for request in range(1, min(4000, len(general) - needed - before)):
        signal.update(foreign[next(theirs)][0] if rng.random() < share else general[next(ours)][0])
        while len(found) < 2 and signal.log_evidence >= np.log((1e4, 1e5)[len(found)]):
            found.append(request)
        if len(found) == 2:
            return found
    return found + [request] * (2 - len(found))


def test_a_change_of_topic_alarms_and_usual_traffic_does_not(rows):
    rng = np.random.default_rng(4)
    general, medical = rows("general"), rows("medical")
    order = rng.permutation(len(general))
    signal = Signal("prompt", needed=1000, threshold=1e5, seed=1)
    for i in order[:2500]:
        assert not signal.update(general[i][0])
    assert any(signal.update(medical[i][0]) for i in range(60))
    assert signal.effects()["rank_shift"] > 0.1


def test_repeated_prompts_alarm_unless_they_are_thinned(rows):
    rng = np.random.default_rng(8)
    general = rows("general")
    order = rng.permutation(len(general))
    bare = Signal("prompt", needed=500, threshold=1e4, seed=2)
    thinned = Signal("prompt", needed=500, threshold=1e4, seed=2)
    thinning: Thinning = Thinning(interval=60, warm_up=WINDOW, ahead=0)
    asked = 0
    for request, i in enumerate(order[:3000]):
        row, tokens = general[i]
        repeats = 1 if request < 500 else 5  # a client that sends everything five times comes along
        for again in range(repeats):
            near = [*tokens, 30 + again] if again % 2 else tokens
            asked += 1
            if not bare.drifted:
                bare.update(row)
            if taken := thinning.offer(row, tokens=near, now=request * 10.0, key=request):
                thinned.update(taken.item)
    assert bare.drifted
    assert not thinned.drifted
    assert sum(thinning.counts.values()) == asked
    # Of the shortest prompts, a copy with one more token is another prompt.
    assert thinning.counts["repeated"] + thinning.counts["near_duplicate"] >= 0.98 * 4 * 2500
    assert thinned.samples >= 2000
