"""A version's baseline survives restarts, fits what it was made for, and alarms on evidence and effect together."""

from __future__ import annotations

import json
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest

from serve.drift.baseline import Baseline, Phase, Provenance, Signal, Tolerance
from serve.drift.detector import mean_rows
from serve.drift.detector.mean_rows import MeanRows
from serve.drift.features.features import LOGPROB, OUTPUT, PROMPT
from serve.drift.features.token_surprise import NAMES, SKETCH, sketch
from serve.errors import ConfigError

MINE = Provenance("acme/tone", "1a7b88586afe", embedding="e" * 64, tokenizer="t" * 64, seed=5)


def rows(rng, *, topic=0.0, refusals=0.02, logprob=-1.0):
    prompt = rng.standard_normal(33) + topic * (np.arange(33) == 0)
    output = rng.standard_normal(5)
    output[2] = rng.random() < refusals
    stats = [logprob + 0.3 * rng.standard_normal(), -5 + rng.standard_normal(), 1 + 0.1 * rng.standard_normal()]
    return {PROMPT: prompt, OUTPUT: output, LOGPROB: np.concatenate((stats, [output[0]], prompt))}


def feed(baseline, rng, n, **how):
    alarms = []
    for _ in range(n):
        alarms += [kind for kind, row in rows(rng, **how).items() if baseline.signals[kind].update(row)]
    return alarms


def small(provenance=MINE):
    baseline = Baseline(provenance)
    baseline.configure(threshold=1e4, tolerance=Tolerance(), needed=dict.fromkeys((PROMPT, OUTPUT, LOGPROB), 200))
    return baseline


def test_the_first_requests_become_the_reference():
    baseline, rng = small(), np.random.default_rng(1)
    feed(baseline, rng, 199)
    assert {baseline.signals[kind].phase for kind in (PROMPT, OUTPUT, LOGPROB)} == {Phase.GATHERING}
    assert baseline.signals[PROMPT].gathered == 199 and baseline.signals[PROMPT].effects() == {}
    feed(baseline, rng, 1)
    assert {baseline.signals[kind].phase for kind in (PROMPT, OUTPUT, LOGPROB)} == {Phase.WATCHING}
    assert feed(baseline, rng, 500) == []
    assert baseline.signals[OUTPUT].samples == 500


@pytest.mark.parametrize(
    ("kind", "how", "effect"),
    [
        (PROMPT, {"topic": 2.0}, "rank_shift"),
        (OUTPUT, {"refusals": 0.5}, "foreign_share"),
        (LOGPROB, {"logprob": -1.5}, "logprob"),
    ],
)
def test_what_moves_far_alarms_on_its_own_signal(kind, how, effect):
    baseline, rng = small(), np.random.default_rng(2)
    feed(baseline, rng, 500)
    assert feed(baseline, rng, 250, **how) == [kind]
    signal = baseline.signals[kind]
    assert signal.alarmed and signal.alarms == 1 and effect in signal.beyond()
    assert abs(signal.changed_at - 300) <= 40
    if effect == "logprob":
        assert signal.effects()[effect] == pytest.approx(-0.5, abs=0.15)
    signal.acknowledge()
    assert not signal.alarmed and not signal.drifted and signal.log_evidence == -np.inf


def test_what_moves_a_little_is_evidence_and_no_alarm():
    rng = np.random.default_rng(3)
    signal = Signal(LOGPROB, needed=2000, threshold=1e4, tolerance=Tolerance(rank_shift=0.5))
    for _ in range(2000):
        signal.update(rows(rng)[LOGPROB])
    for _ in range(3000):
        signal.update(rows(rng, logprob=-1.12)[LOGPROB])
    assert signal.drifted and not signal.alarmed
    assert signal.movers(1)[0][0] == "mean_logprob"


def sketched(rng, language=0):
    """A prompt's row with its tokens; another language has other tokens and nothing else."""
    tokens = rng.zipf(1.4, rng.integers(5, 40)) % 5000 + 5000 * language
    return np.concatenate((rng.standard_normal(33), sketch(tokens)))


@pytest.mark.parametrize(("share", "within"), [(1.0, 15), (0.1, 400)])
def test_another_language_alarms_also_where_it_is_a_tenth_of_the_requests(share, within):
    rng = np.random.default_rng(11)
    signal = Signal(PROMPT, needed=600, threshold=1e5, seed=1)
    for _ in range(1200):
        assert not signal.update(sketched(rng))
    for _ in range(within):
        if signal.update(sketched(rng, language=int(rng.random() < share))):
            break
    assert signal.alarmed and "foreign_share" in signal.beyond()
    assert signal.effects()["foreign_share"] <= 1.5 * share
    assert signal.movers(1)[0][0] in NAMES


def test_a_restart_keeps_the_scores_of_tokens_to_the_bit():
    rng = np.random.default_rng(12)
    signal = Signal(PROMPT, needed=100, seed=1)
    for _ in range(250):
        signal.update(sketched(rng))
    twin = Signal(PROMPT, needed=100)
    twin.restore(signal.state())
    for _ in range(40):
        row = sketched(rng, language=1)
        assert signal.update(row) == twin.update(row)
        assert signal.log_evidence == twin.log_evidence
    assert signal.effects() == twin.effects() and signal.movers() == twin.movers()
    with pytest.raises(ValueError, match="33 numbers"):
        twin.update(np.zeros(33))


def with_mean_row(rng, genre=0.0):
    """A prompt's row with its tokens and its mean row, in which a genre moves every number a little."""
    return np.concatenate((sketched(rng), rng.standard_normal(48) + genre))


def test_a_genre_that_only_mean_rows_tell_alarms_and_no_mean_row_is_written():
    rng = np.random.default_rng(16)
    baseline = Baseline(MINE)
    signal = baseline.signals[PROMPT]
    signal.needed = 600
    for _ in range(700):
        assert not signal.update(with_mean_row(rng))
    assert signal.structure()["mean_rows"] == "ranking"
    assert not any({48, 50} & set(values.shape) for values in signal.state().values())
    later = baseline.successor(MINE).signals[PROMPT]
    twin = Signal(PROMPT)
    twin.restore(signal.state())
    assert later.structure()["mean_rows"] == "ranking", "the next version goes on with them"
    assert twin.structure()["mean_rows"] == "gathering" and twin.log_evidence == signal.log_evidence
    for watching in (signal, later):
        genre = np.random.default_rng(17)
        assert any(watching.update(with_mean_row(genre, 0.5 * (genre.random() < 0.5))) for _ in range(300))
        assert watching.changed_at is not None and watching.effects()["foreign_share"] > 0.03


def of_a_hidden_genre(rng, genre=0.0):
    """Rare tokens, and a mean row that moves with how many there are: only what the surprise does not explain tells."""
    length, share = int(rng.integers(20, 60)), rng.random() * 0.5
    rare = rng.random(length) < share
    tokens = np.where(rare, rng.integers(100, 3000, length), rng.zipf(2.0, length) % 100)
    moved = 6 * (rare.mean() - 0.25 + genre)
    return np.concatenate((rng.standard_normal(33), sketch(tokens), rng.standard_normal(48) + moved))


def test_mean_rows_are_compared_among_prompts_whose_tokens_surprise_as_much():
    delays = []
    for weight in (mean_rows.SURPRISE, 0.0):
        rng, signal = np.random.default_rng(20), Signal(PROMPT, needed=600, seed=1)
        with patch.object(mean_rows, "SURPRISE", weight):
            for _ in range(600):
                signal.update(of_a_hidden_genre(rng))
            alarms = (now for now in range(1000) if signal.update(of_a_hidden_genre(rng, 0.1)))
            delays.append(next(alarms, 1000))
    assert delays[0] < 0.6 * delays[1], delays


def test_surprises_in_mean_rows_are_as_large_in_the_half_that_they_were_fitted_on():
    # With itself in the counts, a prompt surprises less by half a standard deviation and more.
    rng, signal = np.random.default_rng(21), Signal(PROMPT, needed=1000, seed=1)
    gathered = [with_mean_row(rng) for _ in range(1000)]
    with patch.object(MeanRows, "of", wraps=MeanRows.of) as of:
        for row in gathered:
            signal.update(row)
    surprises = np.array(of.call_args.args[0])[:, 48:] / mean_rows.SURPRISE
    assert surprises.shape == (1000, 2)
    later = np.array([signal.raw(with_mean_row(rng))[33:35] for _ in range(1000)])
    for half in (surprises[::2], surprises[1::2]):
        assert np.abs(half.mean(axis=0) - later.mean(axis=0)).max() < 0.2
    own = np.array([signal.raw(row)[33:35] for row in gathered[::2]])
    assert (later.mean(axis=0) - own.mean(axis=0)).max() > 0.4


def test_mean_rows_of_a_baseline_without_surprises_are_ranked_as_they_are():
    rng = np.random.default_rng(22)
    earlier = Signal(PROMPT, needed=300)
    for _ in range(310):
        earlier.update(rng.standard_normal(33))
    signal = Signal(PROMPT)
    signal.restore(earlier.state())
    for _ in range(300):
        signal.update(with_mean_row(rng))
    assert signal.structure()["mean_rows"] == "ranking"
    assert any(signal.update(with_mean_row(rng, 0.8)) for _ in range(200))


@pytest.mark.parametrize("needed", [210, 45])  # with mean rows that are ranked, and without
def test_several_rows_at_once_are_those_rows_one_by_one_to_the_bit(needed):
    rng = np.random.default_rng(19)
    rows = [with_mean_row(rng) for _ in range(250)] + [with_mean_row(rng, 0.8) for _ in range(60)]
    alone, together = Signal(PROMPT, needed=needed, threshold=100), Signal(PROMPT, needed=needed, threshold=100)
    alarms = [alone.update(row) for row in rows]
    blocks = [rows[i : i + 8] for i in range(0, len(rows), 8)]  # the reference is complete within a block
    assert [alarm for block in blocks for alarm in together.steps(block)] == alarms
    left, right = alone.state(), together.state()
    assert left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)
    assert alone.effects() == together.effects() and alone.changed_at == together.changed_at


def test_of_an_earlier_release_mean_rows_are_gathered_anew():
    rng = np.random.default_rng(18)
    earlier = Signal(PROMPT, needed=300)
    for _ in range(310):
        earlier.update(sketched(rng))
    signal = Signal(PROMPT)
    signal.restore(earlier.state())
    assert "mean_rows" not in signal.structure()
    for _ in range(300):
        signal.update(with_mean_row(rng))
    assert signal.structure()["mean_rows"] == "ranking" and not signal.alarmed


def test_what_a_reference_gathers_is_written_without_its_tokens():
    rng = np.random.default_rng(13)
    signal = Signal(PROMPT, needed=100, seed=1)
    for _ in range(60):
        signal.update(sketched(rng))
    state = {name: value for name, value in signal.state().items() if not name.startswith("fixed.")}
    assert state.keys() == {"gathered", "counts", "layout"} and state["gathered"].shape == (60, 33)


def test_after_a_restart_half_of_the_reference_comes_anew_with_its_tokens():
    rng = np.random.default_rng(14)
    before = Signal(PROMPT, needed=100, seed=1)
    for _ in range(80):
        before.update(sketched(rng))
    signal = Signal(PROMPT, needed=100, seed=1)
    signal.restore(before.state())
    for request in range(50):
        assert signal.phase is Phase.GATHERING, request
        signal.update(sketched(rng))
    assert signal.phase is Phase.WATCHING and signal.names[-2:] == NAMES
    # One that restarts again and again does without.
    restless = Signal(PROMPT, needed=100, seed=1)
    while restless.phase is Phase.GATHERING and restless.gathered < 300:
        for _ in range(20):
            restless.update(sketched(rng))
        again = Signal(PROMPT, needed=100, seed=1)
        again.restore(restless.state())
        restless = again
    assert restless.phase is Phase.WATCHING and NAMES[0] not in restless.names


def test_a_baseline_of_an_earlier_release_goes_on_without_scores_of_tokens():
    rng = np.random.default_rng(15)
    signal = Signal(PROMPT, needed=100, seed=1)
    for _ in range(200):
        signal.update(rng.standard_normal(33))
    assert not signal.update(sketched(rng))
    assert signal.samples == 101 and signal.names == ("length",)


@pytest.mark.parametrize("n", [0, 77, 200, 431])
def test_a_restart_keeps_everything_to_the_bit(tmp_path, n):
    baseline, rng = small(), np.random.default_rng(4)
    feed(baseline, rng, n)
    baseline.probe = {"logprobs": rng.standard_normal((32, 20)), "noise": np.array(0.04)}
    baseline.save(tmp_path / "tone")
    twin = Baseline.load(tmp_path / "tone", MINE)
    twin.configure(threshold=1e4, tolerance=Tolerance())
    seed = np.random.default_rng(9)
    more = [rows(seed, topic=1.5) for _ in range(300)]
    for each in more:
        for kind, row in each.items():
            assert baseline.signals[kind].update(row) == twin.signals[kind].update(row)
    for kind, signal in baseline.signals.items():
        ours, theirs = signal.state(), twin.signals[kind].state()
        assert ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)
    assert np.array_equal(baseline.probe["logprobs"], twin.probe["logprobs"])


def test_a_version_costs_less_than_a_megabyte_of_disk(tmp_path):
    """It was ten, which each server of a fleet had for each version that it met."""
    baseline, rng = Baseline(MINE), np.random.default_rng(4)
    baseline.configure(threshold=1e4, tolerance=Tolerance(), needed=dict.fromkeys((PROMPT, OUTPUT, LOGPROB), 1000))
    feed(baseline, rng, 1500)
    baseline.probe = {"logprobs": rng.standard_normal((32, 20)), "noise": np.array(0.04)}
    baseline.save(tmp_path)
    assert {baseline.signals[kind].phase for kind in (PROMPT, OUTPUT, LOGPROB)} == {Phase.WATCHING}
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 1 << 20


def test_saving_again_leaves_one_pair_of_files(tmp_path):
    baseline, rng = small(), np.random.default_rng(5)
    for _ in range(3):
        feed(baseline, rng, 100)
        baseline.save(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    # A kill between the two renames leaves arrays that nobody names, and the pair from before.
    (tmp_path / f"baseline-{'0' * 64}.npz").write_bytes(b"torn")
    assert Baseline.load(tmp_path, MINE).signals[PROMPT].samples == 100


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"embedding": "f" * 64}, "another embedding table"),
        ({"tokenizer": "f" * 64}, "another tokenizer"),
        ({"version": "0" * 12}, "another version"),
        ({"adapter": "tone"}, "another adapter"),
        ({"features": 99}, "another release"),
    ],
)
def test_a_baseline_of_something_else_is_refused(tmp_path, change, said):
    small().save(tmp_path)
    with pytest.raises(ConfigError, match=said):
        Baseline.load(tmp_path, replace(MINE, **change))


def test_a_damaged_baseline_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(ConfigError, match="build it again"):
        Baseline.load(tmp_path, MINE)
    baseline = small()
    feed(baseline, np.random.default_rng(6), 250)
    said = baseline.save(tmp_path)
    (arrays,) = tmp_path.glob("*.npz")
    whole = arrays.read_bytes()
    arrays.write_bytes(whole[:-100])
    with pytest.raises(ConfigError, match="not the ones that were written"):
        Baseline.load(tmp_path, MINE)
    arrays.write_bytes(whole)
    for broken in ('{"format": 99}', "[]", "{", json.dumps(json.loads(said.read_text()) | {"arrays": "../x.npz"})):
        said.write_text(broken)
        with pytest.raises(ConfigError, match="build it again"):
            Baseline.load(tmp_path, MINE)


def test_the_next_version_inherits_the_prompts_and_not_the_answers():
    baseline, rng = small(), np.random.default_rng(7)
    feed(baseline, rng, 400)
    heir = baseline.successor(replace(MINE, version="2" * 12))
    assert heir.signals[PROMPT].phase is Phase.WATCHING and heir.signals[PROMPT].samples == 0
    assert heir.signals[OUTPUT].phase is Phase.GATHERING and heir.signals[OUTPUT].gathered == 0
    with pytest.raises(ConfigError, match="another tokenizer"):
        baseline.successor(replace(MINE, tokenizer="x"))


def test_a_shipped_baseline_watches_from_the_first_request():
    rng = np.random.default_rng(8)
    prompts = [rows(rng)[PROMPT] for _ in range(100)]
    baseline = Baseline.build(MINE, {PROMPT: prompts})
    assert baseline.provenance.origin == "shipped" and baseline.signals[PROMPT].phase is Phase.WATCHING
    assert baseline.signals[OUTPUT].phase is Phase.GATHERING
    with pytest.raises(ConfigError, match="at least 20"):
        Baseline.build(MINE, {PROMPT: prompts[:5]})


def test_a_row_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="33 numbers"):
        Signal(PROMPT).update([1.0])
    with pytest.raises(ValueError, match="not finite"):
        Signal(PROMPT).update(np.full(33, np.nan))
    with pytest.raises(ValueError, match="33 numbers"):
        Signal(PROMPT).update(np.zeros(33 + SKETCH - 1))


def test_the_next_version_begins_without_the_alarms_of_the_one_before():
    baseline, rng = small(), np.random.default_rng(10)
    feed(baseline, rng, 300)
    assert feed(baseline, rng, 100, topic=2.0) == [PROMPT]
    heir = baseline.successor(replace(MINE, version="2" * 12))
    signal = heir.signals[PROMPT]
    assert (signal.samples, signal.alarms, signal.alarmed, signal.drifted) == (0, 0, False, False)
    assert signal.log_evidence == -np.inf and signal.effects() == {"rank_shift": 0.0}
    assert feed(heir, rng, 500) == [], "its own traffic is like the reference"
    assert feed(heir, rng, 250, topic=2.0) == [PROMPT], "an alarm of the version before hides none of its own"
    assert signal.alarms == 1 and abs(signal.changed_at - 500) <= 40


def test_an_acknowledged_alarm_hides_no_later_one():
    baseline, rng = small(), np.random.default_rng(11)
    feed(baseline, rng, 300)
    assert feed(baseline, rng, 100, topic=2.0) == [PROMPT]
    signal = baseline.signals[PROMPT]
    signal.acknowledge()
    assert not signal.alarmed and signal.log_evidence == -np.inf
    assert feed(baseline, rng, 400, topic=-4.0) == [PROMPT]
    assert signal.alarms == 2


def test_an_accepted_change_raises_no_further_alarm():
    baseline, rng = small(), np.random.default_rng(12)
    feed(baseline, rng, 400)
    assert feed(baseline, rng, 100, topic=2.0) == [PROMPT]
    signal = baseline.signals[PROMPT]
    samples, alarms = signal.samples, signal.alarms
    signal.accept()
    # About a hundred requests came since the change: they are the beginning of the new reference, the older ones not.
    assert signal.phase is Phase.GATHERING and 30 <= signal.gathered <= 100
    assert feed(baseline, rng, 200, topic=2.0) == []
    assert signal.phase is Phase.WATCHING and signal.effects()["rank_shift"] < 0.1
    assert PROMPT not in feed(baseline, rng, 3000, topic=2.0)
    assert signal.samples > samples and signal.alarms == alarms, "counters never fall"
    assert feed(baseline, rng, 200) == [PROMPT], "what was the reference before is a change now"


def test_accepting_steady_traffic_takes_the_latest_rows():
    baseline, rng = small(), np.random.default_rng(13)
    feed(baseline, rng, 1000)
    signal = baseline.signals[PROMPT]
    before = signal.reference_row.copy()
    signal.accept()
    assert signal.phase is Phase.WATCHING and not np.array_equal(signal.reference_row, before)
    assert feed(baseline, rng, 500) == []


def test_a_change_can_be_accepted_after_a_restart(tmp_path):
    baseline, rng = small(), np.random.default_rng(14)
    feed(baseline, rng, 400)
    feed(baseline, rng, 150, topic=2.0)
    baseline.save(tmp_path)
    twin = Baseline.load(tmp_path, MINE)
    ours, theirs = baseline.signals[PROMPT], twin.signals[PROMPT]
    assert theirs.changed_at == ours.changed_at
    assert np.array_equal(theirs.changed_rows(), ours.changed_rows()) and len(ours.changed_rows()) >= 100
    theirs.accept()
    assert theirs.gathered >= 60


@pytest.mark.parametrize("weekend", [0.2, 0.6])
def test_a_week_that_hundreds_of_numbers_show_alone_is_usual_for_all_scores(weekend):
    rng = np.random.default_rng(0)
    share = np.where(np.arange(1000) // 100 % 7 >= 5, weekend, 0.2)
    means = rng.standard_normal((1000, 200)) + 0.3 * (rng.random(1000) < share)[:, None]
    leads, tokens = rng.standard_normal((1000, 33)), rng.integers(400, size=(1000, SKETCH))
    signal = Signal(PROMPT, needed=1000)
    assert not any(signal.steps(np.concatenate((leads, tokens, means), axis=1)))
    structure = signal.structure()
    said = structure["wandering_scores"], structure.get("mean_rows")
    assert said == ((0, "ranking") if weekend == 0.2 else (3, None))
