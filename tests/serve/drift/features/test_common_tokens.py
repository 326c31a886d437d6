"""What the most frequent tokens of a text say about its genre: how far their counts lie from what is usual."""

from __future__ import annotations

import numpy as np
import pytest

from serve.drift.features.common_tokens import COMMON, CommonTokens
from serve.drift.features.token_surprise import BUCKETS, sketch


def texts(rng, n, order):
    """Texts of 40 tokens by Zipf's law; `order` says which of 1,000 tokens is how frequent."""
    return [sketch(order[np.minimum(rng.zipf(1.5, 40), 1000) - 1]) for _ in range(n)]


def test_the_same_genre_spreads_by_one_and_another_is_seen_in_single_tokens():
    rng = np.random.default_rng(1)
    usual = rng.permutation(1000) + 300
    other = usual.copy()
    other[:8] = other[:8][::-1]
    common = CommonTokens.fit(texts(rng, 800, usual))
    same = np.array([common(part) for part in texts(rng, 800, usual)])
    assert np.abs(same.mean(axis=0)).max() < 0.25
    assert np.abs(same[:, :20].std(axis=0) - 1).max() < 0.3
    moved = np.array([common(part) for part in texts(rng, 400, other)])
    assert np.abs(moved.mean(axis=0))[:8].max() > 2


def test_they_are_the_most_frequent_ones_in_order():
    rng = np.random.default_rng(2)
    common = CommonTokens.fit(texts(rng, 400, np.arange(1000) + 300))
    first = sketch([300])[0]
    assert common.place[int(first)] == 0 and (np.diff(common.shares) <= 0).all()
    assert np.count_nonzero(common.place < COMMON) == COMMON and common.place[BUCKETS] == COMMON


def test_a_text_without_tokens_says_nothing():
    common = CommonTokens.fit([sketch([]) for _ in range(5)])
    assert np.abs(common(sketch([]))).max() < 1e-3
    assert np.isfinite(common(sketch(range(500)))).all()


def test_it_is_kept_as_arrays_that_say_the_same(tmp_path):
    rng = np.random.default_rng(3)
    parts = texts(rng, 300, np.arange(1000))
    common = CommonTokens.fit(parts)
    np.savez(tmp_path / "common.npz", allow_pickle=False, **common.arrays())
    with np.load(tmp_path / "common.npz", allow_pickle=False) as arrays:
        twin = CommonTokens.from_arrays(arrays)
        with pytest.raises(ValueError, match="63 frequent tokens"):
            CommonTokens.from_arrays({**arrays, "tokens": arrays["tokens"][1:]})
    assert np.array_equal(common(parts[7]), twin(parts[7]))
