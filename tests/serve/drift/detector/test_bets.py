"""Bets are fair, and win what they should."""

from __future__ import annotations

import numpy as np
import pytest

from serve.drift.detector import bets
from serve.drift.detector.bets import CELLS, FIXED, MOST, Bank, Runs


@pytest.mark.parametrize("table", [bets._SCORE_BETS, bets.MANY_BETS], ids=["scores", "many"])
def test_a_bet_wins_nothing_in_the_mean(table):
    assert len(table) == CELLS and (table > 0).all()
    assert np.allclose(table.mean(axis=0), 1, rtol=1e-12)


def test_scores_are_bet_on_to_both_sides_and_directions_to_one():
    assert np.allclose(bets._SCORE_BETS[::-1, : FIXED // 2], bets._SCORE_BETS[:, FIXED // 2 :])
    assert (np.diff(bets.MANY_BETS, axis=0) >= 0).all()


def test_bets_win_also_when_foreign_requests_are_in_the_bag():
    """A fifth of the requests is foreign, and after a while so are 7 % of those that they are ranked among."""
    rng = np.random.default_rng(6)
    bag = np.sort(rng.standard_normal(200_000) + 2 * (rng.random(200_000) < 0.07))
    live = rng.standard_normal(200_000) + 2 * (rng.random(200_000) < 0.2)
    growth = np.log(bets.MANY_BETS)[bets.cells(bag.searchsorted(live) / len(bag))].mean(axis=0)
    of_none_in_the_bag = [in_bag == 0 for _, _, in_bag in bets.ALONG_MANY]
    assert growth[of_none_in_the_bag].max() < 0.02 < growth.max(), growth


def test_of_bounds_each_side_bets_on_its_own():
    p = np.array([[0.5]])
    least, most = np.array([[0.1]]), np.array([[0.9]])
    (bet,), (low,), (high,) = Bank.prepare(least, most), Bank.prepare(least, least), Bank.prepare(most, most)
    assert np.array_equal(bet[: FIXED // 2], low[: FIXED // 2])
    assert np.array_equal(bet[FIXED // 2 :], high[FIXED // 2 :])
    assert (bet <= Bank.prepare(p, p)[0]).all()


@pytest.mark.parametrize(("shift", "requests"), [(4.0, 4), (2.0, 12)])
def test_what_moves_far_needs_no_learning(shift, requests):
    """Half of the weight is this score's, so that little is lost to the others."""
    rng = np.random.default_rng(3)
    bank = Bank([10.0, 1.0])
    normal = np.sort(rng.standard_normal(20_000))
    for now in range(1, 100):
        where = normal.searchsorted(rng.standard_normal() + shift) / len(normal)
        p = np.array([[min(where, 0.9999), rng.random()]])
        next(bank.steps(Bank.prepare(p, p), [now]))
        if bank.evidence() >= 1e4:
            break
    assert now <= requests
    assert bank.began()[1] == 0 and bank.log_means().argmax() == 0


def test_bets_of_several_requests_at_once_are_those_of_one_after_another():
    rng = np.random.default_rng(4)
    at_once, runs = Runs(6), Runs(6)
    r, page, start = np.zeros(6), np.ones(6), np.zeros(6, np.int64)
    for now in range(0, 200, 8):
        bets = rng.lognormal(0, 1, (8, 6)) * (1e15 if 40 <= now < 120 else 1)
        for i, _ in enumerate(at_once.steps(bets, range(now, now + 8))):
            next(runs.steps(bets[i : i + 1], [now + i]))
            r, page = np.minimum((r + 1) * bets[i], MOST), np.minimum(np.maximum(page, 1) * bets[i], MOST)
            start[page <= 1] = now + i
            for each in (at_once, runs):
                kept = each.state()
                assert (kept["r"] == r).all() and (kept["page"] == page).all() and (kept["start"] == start).all()
        if now == 120:
            for each in (at_once, runs):
                each.reset(now)
            r, page, start = np.zeros(6), np.ones(6), np.full(6, now)
