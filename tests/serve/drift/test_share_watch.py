"""A share of the requests that falls far below what it was is an alarm, once."""

from __future__ import annotations

import numpy as np
import pytest

from serve.drift.share_watch import OPENING_NEEDED, OPENING_WINDOW, OpeningWatch, ShareWatch


def feed(watch, share, n, seed=0):
    for i, outcome in enumerate(np.random.default_rng(seed).random(n) < share):
        watch.update(bool(outcome), float(i))
    return watch


def test_a_share_that_stays_raises_nothing():
    for share in (0.0, 0.02, 0.1, 0.5, 0.9, 1.0):
        assert feed(ShareWatch(needed=512, window=512, fall=1 / 3), share, 20_000).alarms == 0


@pytest.mark.parametrize(("reference", "alarms"), [(100, 0), (10_000, 1)])
def test_how_many_requests_said_what_is_usual_counts(reference, alarms):
    """60 of 100 may be an accident where half of the requests carry an opening, and 10 of 48 another one."""
    watch = ShareWatch(needed=reference, window=OPENING_WINDOW, fall=0.5)
    for outcomes, hits in ((reference, 0.6 * reference), (OPENING_WINDOW, 10)):
        for i in range(outcomes):
            watch.update(i < hits, float(i))
    assert watch.alarms == alarms


def test_a_share_that_collapses_is_an_alarm_until_it_is_acknowledged():
    watch = feed(ShareWatch(needed=512, window=512, fall=1 / 3), 0.9, 2000)
    assert watch.before == pytest.approx(0.9, abs=0.05) and watch.alarmed_at is None
    feed(watch, 0.05, 3000)
    assert watch.alarms == 1 and watch.alarmed_at < 512 and watch.share < 0.1 and watch.log_evidence > 14
    watch.acknowledge()
    feed(watch, 0.05, 3000)
    assert watch.alarms == 1 and watch.before < 0.1, "how it is from now on is usual"


def test_a_small_share_cannot_fall_far_enough_by_chance():
    watch = feed(ShareWatch(needed=512, window=512, fall=1 / 3), 0.01, 1000)
    assert feed(watch, 0.0, 5000).alarms == 0


def opening(watch, known, new=0, n=1, own=0):
    rng = np.random.default_rng(own)
    for i in range(n):
        runs = np.concatenate(
            (np.arange(1000, 1000 + known), np.arange(9000, 9000 + new), rng.integers(10**6, 10**9, own))
        )
        watch.update(runs.astype(np.uint64), float(i))
    return watch


@pytest.mark.parametrize("after", [(0, 500), (40, 400), (400, 100), (0, 0)])
def test_openings_that_are_replaced_lengthened_or_gone_are_an_alarm(after):
    watch = opening(OpeningWatch(), 400, n=2 * OPENING_NEEDED + OPENING_WINDOW, own=3)
    assert watch.share.share == 1.0 and watch.share.alarms == 0
    opening(watch, *after, n=OPENING_WINDOW // 2 + 2)
    assert watch.share.alarms == 1
    watch.acknowledge()
    opening(watch, *after, n=500)
    assert watch.share.alarms == 1 and watch.share.share == 1.0


def test_an_opening_where_there_was_none_is_an_alarm():
    watch = opening(OpeningWatch(), 0, n=500, own=2)
    assert watch.share.alarms == 0
    assert opening(watch, 0, 50, n=30).share.alarms == 1


def test_a_restart_keeps_what_is_usual():
    watch = opening(OpeningWatch(), 400, n=300)
    again = OpeningWatch()
    again.restore(watch.state())
    for each in (watch, again):
        opening(each, 0, 300, n=40)
    assert watch.share.alarms == again.share.alarms == 1
    assert watch.share.alarmed_at == again.share.alarmed_at
