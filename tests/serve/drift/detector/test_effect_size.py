"""How far requests lie from the reference is said from below: by no more than it is, mostly."""

from __future__ import annotations

import numpy as np
import pytest

from serve.drift.detector.effect_size import foreign_share, rank_shift


@pytest.mark.parametrize("share", [0.0, 0.02, 0.1, 0.5, 1.0])
def test_a_share_is_seldom_called_larger_than_it_is(share):
    rng = np.random.default_rng(1)
    said = []
    for _ in range(200):
        ranks = rng.random((256, 6))
        foreign = rng.random(256) < share
        ranks[foreign, 2] = 1 - 0.05 * rng.random(foreign.sum())
        said.append(foreign_share(ranks, 1000))
    print(f"{share:.0%}: {np.median(said):.1%}")
    assert np.mean(np.array(said) > share + 0.03) <= 0.05
    assert np.median(said) >= share / 2 - 0.03


def test_nothing_is_said_of_nothing():
    none = np.zeros((0, 3))
    assert foreign_share(none, 100) == 0 and (rank_shift(none, 1.0) == 0).all()


def test_a_rank_shift_is_less_its_error():
    ranks = np.full((100, 2), 0.5)
    ranks[:, 1] = 0.9
    assert rank_shift(ranks, 0.1) == pytest.approx([0, 0.4 - 0.1 / 12**0.5])


def test_of_a_small_reference_the_ends_may_be_wider():
    """Half of all such references have an end that holds twice as many as it should."""
    rng = np.random.default_rng(2)
    said = []
    for _ in range(200):
        reference, requests = np.sort(rng.random((50, 6)), axis=0), rng.random((150, 6))
        ranks = np.array([known.searchsorted(new) for known, new in zip(reference.T, requests.T, strict=True)]).T / 50
        said.append(foreign_share(ranks, 50))
    assert np.mean(np.array(said) > 0.03) <= 0.1
