"""Directions are learned from ranks alone, and tie where rows are equal."""

from __future__ import annotations

import numpy as np
import pytest

from serve.drift.detector.directions import HALF_LIVES, Directions


def test_a_direction_points_to_where_requests_went():
    rng = np.random.default_rng(1)
    onto = rng.standard_normal(20) / np.sqrt(20)
    directions = Directions(rng.standard_normal((400, 20)).astype(np.float32), 1000)
    p = []
    for row in (rng.standard_normal((150, 20)) + 2 * onto).astype(np.float32):
        p.append(directions.rank(row, rng))
        # A p-value of each score, as the detector's bags would give it.
        directions.teach(np.clip((row > rng.standard_normal((400, 20))).mean(axis=0), 0, 0.999), 1.0)
    assert np.mean(p[75:], axis=0)[:3].min() > 0.65  # those before are in the bag too
    assert (directions._towards[1] @ onto) / np.linalg.norm(onto) > 0.7


def test_only_what_raises_the_evidence_teaches_the_last_direction():
    directions = Directions(np.eye(3, dtype=np.float32), 10)
    for multiple in (0.0, 0.5, 0.9):
        directions.teach(np.array([0.99, 0.5, 0.5]), multiple)
    assert directions._learned[0, 0] > 0 and directions._learned[-1, 0] == 0
    directions.teach(np.array([0.5, 0.99, 0.5]), 50.0)
    assert directions._towards[-1].argmax() == 1


@pytest.mark.parametrize("size", [3, 97])
def test_equal_rows_share_a_rank(size):
    """In float32 the projections of equal rows may differ by a rounding."""
    rng = np.random.default_rng(2)
    row = rng.standard_normal(37).astype(np.float32)
    directions = Directions(np.repeat(row[None], size, axis=0), 1000)
    p = []
    for _ in range(400):
        directions.teach(rng.random(37), 1.0)
        p.append(directions.rank(row, rng)[:3])
    assert np.abs(np.histogram(np.ravel(p), 4, (0, 1))[0] / (3 * len(p)) - 0.25).max() < 0.06


def test_a_full_bag_stays_full_and_a_restored_one_goes_on():
    rng = np.random.default_rng(3)
    directions = Directions(rng.standard_normal((5, 4)).astype(np.float32), 8)
    for row in rng.standard_normal((30, 4)).astype(np.float32):
        directions.rank(row, rng)
        directions.teach(rng.random(4), 2.0)
    state = directions.state()
    assert state["bag"].shape == (8, 4) and state["learned"].shape == (len(HALF_LIVES), 4)
    twin = Directions.from_state(state, 8)
    row, lots = rng.standard_normal(4).astype(np.float32), np.random.default_rng(4)
    assert np.array_equal(directions.rank(row, np.random.default_rng(4)), twin.rank(row, lots))


def test_of_an_earlier_release_the_bag_goes_on():
    rng = np.random.default_rng(5)
    bag = rng.standard_normal((6, 4)).astype(np.float32)
    old = {"bag": bag, "sum": bag.sum(axis=0), "live": np.zeros((2, 4)), "weight": np.ones((2, 1))}
    directions = Directions.from_state(old, 10)
    assert np.array_equal(directions.state()["bag"], bag) and not directions.state()["learned"].any()


def test_silent_scores_turn_directions_by_their_values():
    rng = np.random.default_rng(6)
    directions = Directions(rng.standard_normal((300, 12)).astype(np.float32), 1000, silent=8)
    p = []
    for row in rng.standard_normal((200, 12)).astype(np.float32) + 1.5 * (np.arange(12) == 9):
        p.append(directions.rank(row, rng))
        directions.teach(rng.random(4), 1.0, row[4:])
    assert directions._towards[2].argmax() == 9
    assert np.mean(p[100:], axis=0)[2] > 0.6


def test_between_two_turns_rows_are_ranked_along_what_was_learned_before():
    rng = np.random.default_rng(7)
    directions = Directions(rng.standard_normal((50, 5)).astype(np.float32), 100, turn=4)
    before = directions._towards.copy()
    for request in range(1, 9):
        directions.rank(rng.standard_normal(5).astype(np.float32), rng)
        directions.teach(rng.random(5), 1.0)
        assert np.array_equal(directions._towards, before) == (request < 4), request
    along = directions._towards @ directions._bag[:, : directions._size]
    assert np.allclose(along, directions._along[:, : directions._size], atol=1e-5)
