"""Bets are fair, whatever they have learned, and those of an earlier release go on."""

from __future__ import annotations

import numpy as np
import pytest

from serve.drift.detector import bets
from serve.drift.detector.bets import CELLS, FIXED, Bank


@pytest.mark.parametrize(
    "table", [bets._SCORE_BETS, bets._DIRECTION_BETS, bets.MANY_BETS], ids=["scores", "directions", "many"]
)
def test_a_fixed_bet_wins_nothing_in_the_mean(table):
    assert len(table) == CELLS and (table > 0).all()
    assert np.allclose(table.mean(axis=0), 1, rtol=1e-12)


def test_scores_are_bet_on_to_both_sides_and_directions_to_one():
    assert np.allclose(bets._SCORE_BETS[::-1, : FIXED // 2], bets._SCORE_BETS[:, FIXED // 2 :])
    assert (np.diff(bets._DIRECTION_BETS, axis=0) >= 0).all() and (np.diff(bets.MANY_BETS, axis=0) >= 0).all()


def test_bets_win_also_when_foreign_requests_are_in_the_bag():
    """A fifth of the requests is foreign, and after a while so are 7 % of those that they are ranked among."""
    rng = np.random.default_rng(6)
    bag = np.sort(rng.standard_normal(200_000) + 2 * (rng.random(200_000) < 0.07))
    live = rng.standard_normal(200_000) + 2 * (rng.random(200_000) < 0.2)
    growth = np.log(bets.MANY_BETS)[bets.cells(bag.searchsorted(live) / len(bag))].mean(axis=0)
    of_none_in_the_bag = [in_bag == 0 for _, _, in_bag in bets.ALONG_MANY]
    assert growth[of_none_in_the_bag].max() < 0.02 < growth.max(), growth


def test_a_bank_is_fair_after_it_has_learned():
    rng = np.random.default_rng(1)
    bank = Bank(np.ones(3), 2)
    for now in range(1, 200):
        bank.observe(rng.beta(2, 1, 5), now)
    kept = bank.state()
    multiples = []
    for p in np.random.default_rng(2).random((4000, 5)):
        bank.restore(kept)
        multiples.append(bank.observe(p, 200))
    assert np.mean(multiples) == pytest.approx(1, abs=4 * np.std(multiples) / np.sqrt(len(multiples)))


@pytest.mark.parametrize(("shift", "requests"), [(4.0, 4), (2.0, 12)])
def test_what_moves_far_needs_no_learning(shift, requests):
    """Half of the weight is this score's, so that little is lost to the others."""
    rng = np.random.default_rng(3)
    bank = Bank([10.0, 1.0], 0)
    normal = np.sort(rng.standard_normal(20_000))
    for now in range(1, 100):
        where = normal.searchsorted(rng.standard_normal() + shift) / len(normal)
        bank.observe(np.array([min(where, 0.9999), rng.random()]), now)
        if bank.evidence() >= 1e4:
            break
    assert now <= requests
    assert bank.began()[1] == 0 and bank.weights().argmax() == 0


def test_the_bets_of_an_earlier_release_go_on_with_the_same_evidence():
    scores, directions = 4, 2
    rng = np.random.default_rng(4)
    n = (scores + directions) * len(bets.BETS)
    bins = np.tile([count for count, _ in bets.BETS], scores + directions)
    state = {
        "r": rng.exponential(5, n),
        "page": 1 + rng.exponential(1, n),
        "start": np.arange(n),
        "learned": rng.random(bins.sum()),
        "unit": rng.random(n),
        "weight": rng.random(n),
    }
    bank = Bank(np.ones(scores), 4)
    bank.restore(state)
    half = scores * len(bets.BETS)
    assert bank.evidence() == pytest.approx((state["r"][:half].mean() + state["r"][half:].mean()) / 2)
    assert bank.began()[1] == state["start"][state["page"][:half].argmax()]
    again = Bank(np.ones(scores), 4)
    again.restore(bank.state())
    p = rng.random(scores + 4)
    assert bank.observe(p, 99) == again.observe(p, 99)


def test_histograms_of_directions_in_a_state_are_left_out():
    """Releases that kept them: a run of theirs that was the strongest would date every later change."""
    scores, directions, rng = 4, 4, np.random.default_rng(6)
    bank = Bank(np.ones(scores), directions)
    for now in range(1, 60):
        bank.observe(rng.beta(2, 1, scores + directions), now)
    state, more = bank.state(), directions * len(bets.BETS)
    earlier = dict(state)
    for name, value in (("r", 9.0), ("page", 1e200), ("start", 7)):
        earlier[name] = np.insert(state[name], scores * len(bets.BETS), np.full(more, value))
    for name in ("unit", "weight"):
        earlier[name] = np.append(state[name], np.ones(more))
    earlier["learned"] = np.append(state["learned"], np.ones(directions * sum(bins for bins, _ in bets.BETS)))
    again = Bank(np.ones(scores), directions)
    again.restore(earlier)
    assert all(np.array_equal(again.state()[name], state[name]) for name in state)
    assert again.began() == bank.began() and bank.began()[1] != 7
    p = rng.random(scores + directions)
    assert again.observe(p, 60) == bank.observe(p, 60)
