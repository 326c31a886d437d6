"""Requests that differ from the reference by no more than is tolerated are seldom called more, others soon are."""

from __future__ import annotations

import numpy as np
import pytest

from serve.drift.detector.effect_size import ALPHA, EffectSize


def places(reference, scores):
    """(n, 1) each: the reference's scores below each, and not above it."""
    known = np.sort(reference)
    return known.searchsorted(scores, "left")[:, None], known.searchsorted(scores, "right")[:, None]


def requests_until_beyond(rng, usual, foreign, share, *, size=200, tolerated=0.03, limit=1500):
    """`usual(n)` and `foreign(n)` draw scores."""
    effect = EffectSize(1, size)
    reference = usual(size)

    def draw(n):
        return np.where(rng.random(n) < share, foreign(n), usual(n))

    effect.begin(np.ones(1), *places(reference, draw(40)), tolerated)
    less, upto = places(reference, draw(limit))
    for request in range(limit):
        effect.observe(less[request], upto[request], tolerated)
        if effect.beyond:
            return request + 1
    return None


@pytest.mark.parametrize("share", [0.0, 0.03])
@pytest.mark.parametrize("kind", ["normal", "discrete"])
def test_a_tolerated_share_is_called_larger_no_more_often_than_is_said(kind, share):
    """The foreign ones lie where they are seen best."""
    called = 0
    for seed in range(120):
        rng = np.random.default_rng(seed)
        if kind == "normal":
            usual, foreign = rng.standard_normal, lambda n: np.full(n, 9.0)
        else:
            usual, foreign = (lambda n, rng=rng: (rng.random(n) < 0.1).astype(float)), lambda n: np.full(n, 2.0)
        called += requests_until_beyond(rng, usual, foreign, share) is not None
    assert called <= 120 * ALPHA + 2.58 * np.sqrt(120 * ALPHA * (1 - ALPHA)), called


@pytest.mark.parametrize(("share", "shift", "most"), [(1.0, 3.0, 5), (0.3, 3.0, 40), (0.2, 2.0, 250), (0.1, 4.0, 250)])
def test_larger_shares_are_seen(share, shift, most):
    times = []
    for seed in range(24):
        rng = np.random.default_rng(seed)
        seen = requests_until_beyond(
            rng, rng.standard_normal, lambda n, rng=rng: rng.standard_normal(n) + shift, share, size=500
        )
        times.append(seen or np.inf)
    print(f"{share:.0%} by {shift}: {np.median(times):.0f}")
    assert np.median(times) <= most


def test_what_is_all_tolerated_is_never_beyond():
    rng = np.random.default_rng(3)
    assert requests_until_beyond(rng, rng.standard_normal, lambda n: np.full(n, 9.0), 1.0, tolerated=1.0) is None


def test_a_restored_one_goes_on():
    rng = np.random.default_rng(4)
    effect = EffectSize(3, 100)
    less = rng.integers(0, 101, (60, 3))
    effect.begin(np.array([0.5, 0.3, 0.2]), less[:20], less[:20], 0.03)
    for row in less[20:40]:
        effect.observe(row, row, 0.03)
    twin = EffectSize(3, 100)
    twin.restore(effect.state())
    for row in less[40:]:
        effect.observe(row, row, 0.03)
        twin.observe(row, row, 0.03)
    ours, theirs = effect.state(), twin.state()
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)
