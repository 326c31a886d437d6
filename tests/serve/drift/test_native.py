"""The C++ code gives the numbers that numpy gives, over long streams; and without a compiler numpy does all of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import numpy as np
import pytest

from serve.drift import native as module
from serve.drift.detector.detector import Drift
from serve.drift.detector.mean_rows import MeanRows
from serve.drift.features.common_tokens import COMMON, CommonTokens
from serve.drift.features.embedding import Embedding
from serve.drift.features.features import Answer, answer_rows, prompt_row
from serve.drift.features.token_runs import RUN, STRETCH, SharedRuns
from serve.drift.features.token_scores import TokenScores
from serve.drift.features.token_surprise import TokenSurprise, sketch
from serve.drift.native import native
from serve.drift.thinning import Thinning

needs_native = pytest.mark.skipif(native() is None, reason="no C++ compiler")
BLOCK, WIDTH = 8, 48


@contextmanager
def without_compiler() -> Iterator[None]:
    with patch.object(module, "compiled", return_value=None):
        native.cache_clear()
        assert native() is None
        yield
    native.cache_clear()


def detector(seed, *, scores=6, silent=0, margin=0.0, turn=1, means=False):
    rng = np.random.default_rng(seed)
    reference = rng.standard_normal((250, scores + silent)).astype(np.float32)
    if scores > 1:  # one with ties
        reference[:, 0] = reference[:, 0] > 0.8
    margins = np.where(np.arange(scores + silent) == 1, margin, 0.0) if margin else None
    rows = list(rng.standard_normal((250, WIDTH)).astype(np.float32)) if means else []
    return Drift(
        reference, threshold=1e4, capacity=400, margin=margins, silent=silent, turn=turn, seed=seed,
        means=MeanRows.of(rows, seed, ordered=False) if means else None,
    )  # fmt: skip


def stream(seed, *, scores=6, silent=0, means=False, shift=0.0, requests=1200):
    """Blocks of rows, and of their mean rows; the second half moves by `shift`."""
    rng = np.random.default_rng(1000 + seed)
    for begin in range(0, requests, BLOCK):
        rows = rng.standard_normal((BLOCK, scores + silent)).astype(np.float32)
        mean_rows = rng.standard_normal((BLOCK, WIDTH)).astype(np.float32)
        if begin >= requests // 2:
            rows += np.float32(shift)
            mean_rows[:, :8] += np.float32(shift)
        if scores > 1:
            rows[:, 0] = rows[:, 0] > 0.8
        yield rows, list(mean_rows) if means else [None] * BLOCK


CASES = {
    "scores": {},
    "one score": {"scores": 1},
    "margins": {"margin": 0.3},
    "silent scores": {"silent": 40, "turn": 4},
    "mean rows": {"silent": 16, "turn": 4, "means": True},
}


def watched(seed, case, shift):
    """What a detector said after each block, and its state at the end."""
    made = detector(seed, **case)
    said, alarms = [], []
    shape = {name: value for name, value in case.items() if name in ("scores", "silent", "means")}
    for rows, mean_rows in stream(seed, shift=shift, **shape):
        alarms += list(made.steps(rows, mean_rows))
        said.append([made.log_evidence, made.changed_at, *made.rank_shift])
    return np.array(said), alarms, made


@needs_native
@pytest.mark.parametrize("shift", [0.0, 0.5])
@pytest.mark.parametrize("name", CASES)
def test_a_detector_says_the_same_with_and_without(name, shift):
    for seed in range(2):
        with without_compiler():
            expected, alarms, plain = watched(seed, CASES[name], shift)
        said, same_alarms, made = watched(seed, CASES[name], shift)
        assert same_alarms == alarms and (shift == 0.0 or any(alarms))
        # A rank along a direction may be another by one where two requests lie nearly as far along it.
        assert np.abs(said[:, 0] - expected[:, 0]).max() < 0.05
        assert np.allclose(said[:, 2:], expected[:, 2:], atol=1e-6)
        states = made.state(), plain.state()
        for exact in ("bags", "lots", "bank.learned", "bank.unit", "bank.weight", "counts"):
            assert np.array_equal(states[0][exact], states[1][exact]), exact
        assert made.foreign_share == pytest.approx(plain.foreign_share, abs=0.02)


def sized(seed, case, stretch):
    """When a detector looked for the size of an effect, when it found it too large, what it then thought of it, and at
    the end."""
    made = detector(seed, **case)
    made.tolerated_share, shift = 0.03, {"slight": 0.2, "clear": 0.6}[stretch]
    shape = {name: value for name, value in case.items() if name in ("scores", "silent", "means")}
    stages, shares = [], []
    for rows, mean_rows in stream(seed, shift=shift, **shape):
        for drifted in made.steps(rows, mean_rows):
            stages.append((drifted, drifted and made.sure, drifted and made.beyond_tolerated_share))
        state = made.state()
        stages.append((*state["stages"].tolist(), float(state["effect.total"][0])))
        shares.append(made.foreign_share or 0.0)
    return stages, np.array(shares), made.state()


@needs_native
@pytest.mark.parametrize("stretch", ["slight", "clear"])
@pytest.mark.parametrize("name", CASES)
def test_an_effect_is_sized_the_same_with_and_without(name, stretch):
    found = 0
    for seed in range(3):
        with without_compiler():
            expected, plain_shares, plain = sized(seed, CASES[name], stretch)
        stages, shares, state = sized(seed, CASES[name], stretch)
        assert stages == expected
        assert np.abs(shares - plain_shares).max() < 0.02
        # A place along a direction may be another by one where two requests lie nearly as far along it.
        for kept in ("effect.counts", "effect.hits"):
            assert np.abs(state[kept] - plain[kept]).max() <= 1, kept
        assert np.allclose(state["effect.weights"], plain["effect.weights"], rtol=0.05, atol=1e-4)
        found += any(stage[2] is True for stage in stages)
    assert found or stretch == "slight"


@needs_native
@pytest.mark.parametrize("name", CASES)
def test_places_in_the_reference_are_those_of_numpy(name):
    made, case = detector(2, **CASES[name]), CASES[name]
    shape = {name: value for name, value in case.items() if name in ("scores", "silent", "means")}
    for rows, mean_rows in stream(2, shift=0.3, requests=240, **shape):
        list(made.steps(rows, mean_rows))
        some = [row if i % 3 else None for i, row in enumerate(mean_rows)]
        found = made._native.places(rows, made.means, some)
        expected = np.array([made._places(*each) for each in zip(rows, some, strict=True)]).transpose(1, 0, 2)
        for places, plain in zip(found, expected, strict=True):
            assert np.abs(places - plain).max() <= 1 and (places != plain).mean() < 0.01


@needs_native
def test_a_detector_goes_on_from_the_other_s_state():
    blocks = list(stream(5, silent=40, requests=320))
    with without_compiler():
        first = detector(5, silent=40, turn=4)
        for rows, mean_rows in blocks[:20]:
            list(first.steps(rows, mean_rows))
        state = first.state()
        for rows, mean_rows in blocks[20:]:
            list(first.steps(rows, mean_rows))
    second = Drift.from_state(state)
    for rows, mean_rows in blocks[20:]:
        list(second.steps(rows, mean_rows))
    assert abs(first.log_evidence - second.log_evidence) < 0.05
    assert np.array_equal(first.state()["bags"], second.state()["bags"])


# Arrays of a state that somebody sent, of another shape or type than they should have: the C++ code takes addresses.
FOREIGN = {
    "directions.squares": np.ones((1, 1)),
    "directions.faded": np.ones((4, 1), np.float32),
    "directions.learned": np.zeros((4, 46), np.float32),
    "directions.age": np.array([0, 0]),
    "counts": np.array([249, 0, -1]),
    "margin": np.zeros(46),
    "weights": np.ones(6, np.float16),
    "reference": np.zeros((250, 6), np.float16),
    "shift": np.zeros(12),
    "seen": np.zeros(1),
    "moved": np.zeros(1),
    "rows": np.zeros((64, 3), np.float32),
    "directions.reference": np.zeros((9, 46)),
    "effect.counts": np.zeros((3, 1)),
    "effect.weights": np.zeros((90, 6, 4)),
}


@needs_native
@pytest.mark.parametrize("name", FOREIGN)
def test_a_state_of_other_arrays_is_refused_or_read_as_numpy_reads_it(name):
    state = detector(1, silent=40, margin=0.3).state() | {name: FOREIGN[name]}

    def said():
        try:
            made = Drift.from_state(state)
        except ValueError:
            return "refused"
        for rows, mean_rows in stream(1, silent=40, requests=160):
            list(made.steps(rows, mean_rows))
        return made.log_evidence, *made.rank_shift

    with without_compiler():
        expected = said()
    assert expected == "refused" if name in ("directions.age", "counts", "shift", "rows") else expected != "refused"
    found = said()
    assert found == expected or np.allclose(found, expected, atol=0.05)


@needs_native
def test_rows_that_lie_otherwise_in_memory_are_the_same():
    one, other = (detector(1) for _ in range(2))
    for rows, mean_rows in stream(1, requests=80):
        list(one.steps(rows, mean_rows))
        list(other.steps(np.asfortranarray(rows), mean_rows))
    assert one.log_evidence == other.log_evidence


@needs_native
def test_mean_rows_of_another_model_are_refused():
    made = detector(1, means=True)
    rows, mean_rows = next(stream(1, means=True))
    with pytest.raises(ValueError, match="47 numbers"):
        list(made.steps(rows, [row[:-1] for row in mean_rows]))
    with pytest.raises(ValueError, match="8 rows come with 7"):
        list(made.steps(rows, mean_rows[:-1]))


@needs_native
def test_requests_one_by_one_are_those_of_a_block_to_the_bit():
    one, many = (detector(3, silent=16, turn=4, means=True) for _ in range(2))
    for rows, mean_rows in stream(3, silent=16, means=True, shift=0.5):
        by_one = [one.update(row, mean_row) for row, mean_row in zip(rows, mean_rows, strict=True)]
        assert by_one == list(many.steps(rows, mean_rows))
    assert one.drifted
    for name, value in one.state().items():
        assert np.array_equal(value, many.state()[name]), name


def prompts(rng, count):
    head, digits = rng.integers(100, 3000, 12), np.zeros(5001, np.bool_)
    digits[10:20] = True
    lengths = rng.integers(0, 60, count)
    lengths[count // 2], lengths[count // 3] = 9000, 1
    made = [rng.zipf(1.3, length) % 5000 for length in lengths]
    for i, tokens in enumerate(made):
        tokens[rng.random(len(tokens)) < 0.1] = 11 + i % 5
    made = [np.concatenate((head, tokens)) if i % 3 else tokens for i, tokens in enumerate(made)]
    return made, digits


@needs_native
@pytest.mark.parametrize("stretch", [RUN, 15, STRETCH])
@pytest.mark.parametrize("numbers", [False, True])
def test_what_prompts_share_is_the_same_with_and_without(numbers, stretch):
    made, digits = prompts(np.random.default_rng(0), 400)
    with without_compiler():
        plain = SharedRuns(digits if numbers else None, stretch)
    quick = SharedRuns(digits if numbers else None, stretch)
    rng = np.random.default_rng(1)
    few = [rng.integers(100, 3000, 90) for _ in range(12)]  # openings of few
    most, begin = rng.integers(100, 3000, 90), rng.integers(100, 3000, 3)  # one of most, and what many then begin with
    opened = [few[i % 12] if i % 4 == 1 else np.concatenate((most, begin[: i % 9 // 2])) for i in range(len(made))]
    made = [np.concatenate((opened[i], tokens)) if i % 6 else tokens for i, tokens in enumerate(made)]
    for i, tokens in enumerate(made):
        if i == 200:
            plain.fix(), quick.fix()
        results = []
        for shared in (plain, quick):
            words, runs = shared.read(np.array(tokens, np.int64))
            own = shared.split(words, runs)
            results.append([words.tokens, words.symbols, runs, own.tokens, own.shared_runs, own.minima])
            results[-1] += [own.words, own.whole]
        assert all(np.array_equal(a, b) for a, b in zip(*results, strict=True))
    for name, values in plain.state().items():
        assert np.array_equal(values, quick.state()[name]), name
    if stretch == STRETCH:
        again = SharedRuns(stretch=stretch)
        again.fix_as(quick.state())
        fixed = quick.state()["fixed"]
        assert again.state()["fixed"].all() and again.state()["tags"].tolist() == quick.state()["tags"][fixed].tolist()


@needs_native
def test_the_same_requests_are_accepted():
    made, digits = prompts(np.random.default_rng(1), 500)
    taken = []
    for context in (without_compiler(), nullcontext()):
        with context:
            thinning = Thinning(interval=0, numbers=digits)
            accepted = [thinning.offer(i, tokens=tokens, now=i) for i, tokens in enumerate(made * 2)]
            taken.append([(each.item, each.own.tolist()) if each else None for each in accepted])
    assert taken[0] == taken[1]


@needs_native
def test_rows_of_features_are_the_same_but_for_roundings():
    rng = np.random.default_rng(2)
    embedding = Embedding.project(rng.standard_normal((500, 96)).astype(np.float32))
    for length in (0, 1, 2, 20, 63, 64, 65, 300, 9000):
        tokens = rng.integers(-2, 520, length)
        rows = []
        for context in (without_compiler(), nullcontext()):
            with context:
                rows.append(prompt_row(embedding, tokens, 3))
                rows.append(answer_rows(embedding, Answer(tokens, "stop", "Yes")).get("output", np.zeros(0)))
        for plain, quick in zip(rows[:2], rows[2:], strict=True):
            assert np.allclose(plain, quick, atol=2e-6), length


def test_a_spread_of_another_shape_is_refused():
    arrays = TokenSurprise.fit(np.array([sketch(range(50))] * 20))[0].arrays()
    with pytest.raises(ValueError, match="spread"):
        TokenSurprise.from_arrays(arrays | {"spread": arrays["spread"][:1]})


@needs_native
def test_scores_of_tokens_are_the_same_but_for_roundings():
    rng = np.random.default_rng(3)
    parts = np.array([sketch(rng.zipf(1.3, rng.integers(0, 90)) % 5000) for _ in range(300)])
    surprise, _ = TokenSurprise.fit(parts[:200])
    for common in (None, CommonTokens.fit(parts[:200])):
        scores = TokenScores(surprise, common)
        with without_compiler():
            plain = scores(parts)
        assert plain.shape == (300, 2 + (COMMON if common else 0))
        assert np.allclose(plain, scores(parts), atol=1e-5)
