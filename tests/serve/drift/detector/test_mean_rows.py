"""Mean rows see a genre that no single number tells, and nothing where nothing changes."""

from __future__ import annotations

import numpy as np
import pytest

from serve.drift.detector.mean_rows import SAME, MeanRows, Phase

WIDTH, NEEDED = 64, 300


def normal(rng, shape):
    return rng.standard_normal(shape)


def heavy_tails(rng, shape):
    return rng.standard_t(2.5, shape)


def few_texts(rng, shape):
    return np.random.default_rng(0).standard_normal((20, WIDTH))[rng.integers(20, size=shape[:-1])]


def correlated(rng, shape):
    return rng.standard_normal(shape) @ np.random.default_rng(0).standard_normal((WIDTH, WIDTH))


def of_unequal_size(rng, shape):
    """As the mean rows of short and of long prompts are."""
    return rng.standard_normal(shape) * np.exp(0.7 * rng.standard_normal((*shape[:-1], 1)))


def observe(means, row, now):
    for _ in means.steps(row[None], [now]):
        pass


def watching(draw, seed, needed=NEEDED):
    rng = np.random.default_rng(seed)
    return rng, MeanRows.of(list(draw(rng, (needed, WIDTH)).astype(np.float32)), seed, ordered=False)


@pytest.mark.parametrize("draw", [normal, heavy_tails, few_texts, correlated, of_unequal_size])
def test_a_false_alarm_takes_at_least_the_threshold_in_the_mean(draw):
    threshold, requests, alarms = 100, 0, 0
    for seed in range(40):
        rng, means = watching(draw, seed)
        assert means.phase is Phase.RANKING
        for row in draw(rng, (1500, WIDTH)).astype(np.float32):
            observe(means, row, requests)
            requests += 1
            if means.evidence() >= threshold:
                alarms += 1
                break
    # The times are nearly exponential: their mean over 40 streams is seldom below by a third.
    assert requests / max(alarms, 1) > 0.85 * threshold


def test_a_fifth_of_requests_that_differ_a_little_in_every_number_is_found():
    delays = []
    for seed in range(5):
        rng, means = watching(normal, seed, 1000)
        foreign = rng.standard_normal(WIDTH) * 4 / WIDTH**0.5
        for now in range(1, 1000):
            row = rng.standard_normal(WIDTH) + (rng.random() < 0.2) * foreign
            observe(means, row.astype(np.float32), now)
            if means.evidence() >= 1e5:
                break
        delays.append(now)
    assert np.median(delays) < 400


def test_a_close_genre_is_found_by_its_probably_foreign_rows():
    """Without the second step of learning the median is twice as long."""
    width, delays = 200, []
    for seed in range(7):
        rng = np.random.default_rng(seed)
        means = MeanRows.of(list(rng.standard_normal((1000, width)).astype(np.float32)), seed)
        foreign = rng.standard_normal(width) * 3 / width**0.5
        for now in range(1, 600):
            row = rng.standard_normal(width) + (rng.random() < 0.2) * foreign
            observe(means, row.astype(np.float32), now)
            if means.evidence() >= 1e5:
                break
        delays.append(now)
    print(delays)
    assert np.median(delays) < 350


def test_equal_rows_say_nothing():
    row = np.random.default_rng(0).standard_normal(WIDTH).astype(np.float32)
    assert MeanRows.of([row] * NEEDED, ordered=False).phase is Phase.OFF


def test_rows_that_change_with_time_are_no_reference():
    rng = np.random.default_rng(0)
    wave = np.sin(np.linspace(0, 6.28, NEEDED))[:, None]
    rows = list((rng.standard_normal((NEEDED, WIDTH)) + wave).astype(np.float32))
    assert MeanRows.of(rows).wanders and MeanRows.of(rows).phase is Phase.OFF
    assert MeanRows.of(rows, ordered=False).phase is Phase.RANKING


def test_few_of_the_rows_that_come_by_chance_change_with_time():
    draws = (heavy_tails(np.random.default_rng(seed), (NEEDED, WIDTH)) for seed in range(40))
    assert sum(MeanRows.of(list(rows.astype(np.float32))).phase is Phase.OFF for rows in draws) <= 4


def test_few_rows_are_no_reference():
    rows = np.random.default_rng(0).standard_normal((50, WIDTH)).astype(np.float32)
    assert MeanRows.of(list(rows)).phase is Phase.OFF


def test_no_row_is_kept_over_a_restart_and_the_evidence_goes_on():
    rng, means = watching(normal, 0)
    for now in range(200):
        observe(means, rng.standard_normal(WIDTH).astype(np.float32), now)
    state = means.state()
    assert sum(values.size for values in state.values()) < WIDTH
    again = MeanRows.from_state(state)
    assert again.evidence() == means.evidence() and again.began() == means.began()
    assert again.phase is Phase.GATHERING
    for now in range(NEEDED):
        observe(again, rng.standard_normal(WIDTH).astype(np.float32), now)
    assert again.phase is Phase.RANKING and again.evidence() == means.evidence()


def test_of_a_reference_that_says_nothing_no_evidence_from_before_a_restart_is_left():
    rng, means = watching(normal, 0)
    for now in range(200):
        observe(means, (rng.standard_normal(WIDTH) + 1).astype(np.float32), now)
    assert means.evidence() > 1 and means.began()[0] > 1
    again = MeanRows.from_state(means.state())
    for now in range(NEEDED):
        observe(again, np.ones(WIDTH, np.float32), now)
    assert again.phase is Phase.OFF and again.evidence() == 0 and again.began()[0] == 1


def test_before_there_is_a_reference_a_row_lies_in_the_middle_of_it():
    assert list(MeanRows(NEEDED).steps(np.zeros((2, WIDTH), np.float32), [1, 2])) == [0.5, 0.5]


class PlainlyRanked(MeanRows):
    """Every row by itself, by looking at the whole bag."""

    def _ranks(self, rows):
        p = []
        for row in rows:
            m, own = self._size, (self._onto @ row.astype(np.float32))[:, None]
            along = self._along[:, :m]
            less, upto = (along < own - SAME).sum(axis=1), (along <= own + SAME).sum(axis=1)
            p.append((less + self._rng.random(len(less)) * (upto - less + 1)) / (m + 1))
            place = m if m < self._capacity else int(self._rng.integers(m + 1))
            self._size = min(m + 1, self._capacity)
            self._along[:, place] = own[:, 0]
            self._waiting_rows[self._waiting], self._waiting_places[self._waiting] = row, place
            self._waiting += 1
        return np.array(p)


@pytest.mark.parametrize("draw", [normal, few_texts])
def test_rows_that_are_ranked_at_once_in_a_sorted_bag_are_ranked_as_one_by_one_in_all_of_it(draw):
    rng = np.random.default_rng(5)
    reference = list(draw(rng, (NEEDED, WIDTH)).astype(np.float32))
    quick, plain = MeanRows.of(reference, 5), PlainlyRanked.of(reference, 5)
    now, requests = 0, 3 * NEEDED  # the bag is full before their end
    while now < requests:
        rows = draw(rng, (int(rng.integers(1, 50)), WIDTH)).astype(np.float32) + (now > NEEDED) * np.float32(0.2)
        for row, ranks in zip(rows, quick.steps(rows, range(now, now + len(rows))), strict=False):
            (plainly,) = plain.steps(row[None], [now])
            assert (ranks == plainly).all()
            assert (quick.evidence(), quick.began()) == (plain.evidence(), plain.began())
            now += 1
        for name, kept in quick.state().items():
            assert (kept == plain.state()[name]).all()
    assert quick._size == quick._capacity
