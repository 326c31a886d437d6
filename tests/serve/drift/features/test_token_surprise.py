"""Tokens that the reference did not have are a surprise, at once and whatever the length of the text."""

from __future__ import annotations

import numpy as np
import pytest

from serve.drift.features.token_surprise import SAMPLED, SKETCH, TokenSurprise, sketch


def text(rng, language=0, least=4, most=120):
    return rng.zipf(1.4, rng.integers(least, most)) % 5000 + 5000 * language


@pytest.fixture
def reference():
    rng = np.random.default_rng(1)
    return [sketch(text(rng)) for _ in range(500)]


@pytest.mark.parametrize("n", [0, 1, 2, SAMPLED - 1, SAMPLED, SAMPLED + 1, 2 * SAMPLED, 1000])
def test_a_sketch_has_the_same_size_for_every_text(n):
    part = sketch(np.arange(n) + 300)
    assert part.shape == (SKETCH,) and part.dtype == np.float32
    singles = min(n, SAMPLED)
    assert np.count_nonzero(part[:SAMPLED] >= 0) == singles
    assert np.count_nonzero(part[SAMPLED:] >= 0) == (SAMPLED if n > SAMPLED else max(n - 1, 0))
    assert (part[singles:SAMPLED] == -1).all()


def test_another_language_surprises_and_the_same_does_not(reference):
    rng = np.random.default_rng(2)
    surprise, _ = TokenSurprise.fit(reference)
    same = np.array([surprise(sketch(text(rng))) for _ in range(300)])
    other = np.array([surprise(sketch(text(rng, language=1))) for _ in range(300)])
    assert np.abs(same.mean(axis=0)).max() < 0.3 and np.abs(same.std(axis=0) - 1).max() < 0.25
    assert (np.quantile(other, 0.1, axis=0) > np.quantile(same, 0.95, axis=0)).all()


def test_those_that_fitted_it_score_as_later_ones_do(reference):
    rng = np.random.default_rng(3)
    surprise, fitted = TokenSurprise.fit(reference)
    later = np.array([surprise(sketch(text(rng))) for _ in range(500)])
    assert fitted.shape == (500, 2)
    assert np.abs(fitted.mean(axis=0) - later.mean(axis=0)).max() < 0.25


def test_a_long_text_spreads_as_much_as_a_short_one(reference):
    rng = np.random.default_rng(4)
    surprise, _ = TokenSurprise.fit(reference)
    short = np.array([surprise(sketch(text(rng, least=4, most=8))) for _ in range(400)])
    long = np.array([surprise(sketch(text(rng, least=60, most=64))) for _ in range(400)])
    assert np.abs(np.log(short.std(axis=0) / long.std(axis=0))).max() < 0.4


def test_it_is_kept_as_arrays_that_say_the_same(reference, tmp_path):
    surprise, _ = TokenSurprise.fit(reference)
    np.savez(tmp_path / "tables.npz", allow_pickle=False, **surprise.arrays())
    with np.load(tmp_path / "tables.npz", allow_pickle=False) as arrays:
        twin = TokenSurprise.from_arrays(arrays)
        with pytest.raises(ValueError, match="token tables"):
            TokenSurprise.from_arrays({**arrays, "tokens": arrays["tokens"][:9]})
    assert np.array_equal(surprise(reference[7]), twin(reference[7]))


def test_empty_texts_are_no_surprise():
    surprise, scores = TokenSurprise.fit([sketch([]) for _ in range(20)])
    assert not surprise(sketch([])).any() and not scores.any()
