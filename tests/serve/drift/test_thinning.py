"""A detector sees neither repeats, nor near-repeats, nor one asker twice in an interval; and how much of the traffic it
sees depends on the last requests only."""

from __future__ import annotations

import numpy as np
import pytest

from serve.drift.thinning import COUNTS, MOST_BETWEEN, Thinning, inherited

RNG = np.random.default_rng(0)
DIGITS = np.zeros(30_001, np.bool_)
DIGITS[100:110] = True


def prompt(length=40, rng=RNG):
    return rng.integers(200, 30_000, length)


HEAD, SYSTEM = prompt(6), prompt(9)


def offered(thinning, prompts, *, step=1000.0, key=None, start=0):
    """Numbers of the prompts that are accepted."""
    taken = [thinning.offer(i, tokens=tokens, now=i * step, key=key) for i, tokens in enumerate(prompts, start)]
    return [request.item for request in filter(None, taken + thinning.flush())]


def counts(**some):
    return dict.fromkeys(COUNTS, 0) | some


def test_a_prompt_is_taken_once():
    thinning: Thinning = Thinning()
    a, b = prompt(), prompt()
    assert offered(thinning, [a, b, a, a.tolist(), b]) == [0, 1]
    assert thinning.counts == counts(accepted=2, repeated=3)


def test_a_prompt_with_a_few_other_words_is_taken_once():
    thinning: Thinning = Thinning()
    found = 0
    for _ in range(100):
        first = prompt(60)
        near = first.copy()
        near[30] += 1
        before = thinning.counts["near_duplicate"]
        offered(thinning, [first, near])
        found += thinning.counts["near_duplicate"] - before
    assert found >= 90


def test_different_prompts_are_all_taken():
    thinning: Thinning = Thinning()
    assert len(offered(thinning, [prompt() for _ in range(1000)])) == 1000
    short: Thinning = Thinning()
    assert len(offered(short, [[i] for i in range(50)] + [[i, 1] for i in range(50)] + [[]])) == 101


def test_a_prompt_is_taken_again_after_a_fixed_number_of_requests():
    thinning: Thinning = Thinning(window=10)
    again = prompt()
    spaced = [again, *(prompt() for _ in range(10)), again, *(prompt() for _ in range(9)), again]
    assert offered(thinning, spaced) == list(range(21))
    # Those that are left out count too: of a prompt that never pauses nothing is seen.
    assert offered(thinning, [again] * 50) == []


def test_what_popular_prompts_are_taken_does_not_change_with_time():
    rng = np.random.default_rng(3)
    pool = [prompt(20, rng) for _ in range(300)]
    weights = 1 / np.arange(1, 301)
    thinning: Thinning = Thinning(warm_up=64)
    ranks = rng.choice(300, 6000, p=weights / weights.sum())
    taken = np.array(offered(thinning, [pool[rank] for rank in ranks]))
    early, late = ranks[taken[taken < 3000]], ranks[taken[taken >= 3000]]
    assert abs(np.log1p(early).mean() - np.log1p(late).mean()) < 0.1
    assert abs(len(early) - len(late)) < 0.1 * len(taken)


def test_nothing_is_taken_before_the_first_window_is_full():
    thinning: Thinning = Thinning(warm_up=64)
    assert offered(thinning, [prompt() for _ in range(100)]) == list(range(64, 100))
    assert thinning.counts == counts(accepted=36, warming_up=64)


def test_where_askers_come_back_their_interval_passes_first():
    for interval, begins in ((300, 300), (1e9, MOST_BETWEEN)):
        thinning: Thinning = Thinning(warm_up=64, interval=interval)
        taken = []
        for i in range(1200):
            if result := thinning.offer(i, tokens=prompt(), now=float(i), key=i % 40):
                taken.append(result.item)
        assert begins - 1 <= taken[0] <= begins + 70


def test_what_is_taken_of_popular_prompts_that_are_askers_does_not_begin_with_them():
    """An asker that repeats its prompt comes back too, though the prompt is what it is left out for."""
    rng = np.random.default_rng(3)
    pool = [prompt(20, rng) for _ in range(3000)]
    weights = 1 / np.arange(1, 3001)
    thinning: Thinning = Thinning(warm_up=64, interval=600)
    ranks = rng.choice(3000, 6000, p=weights / weights.sum())
    taken = []
    for i, rank in enumerate(ranks.tolist()):
        if result := thinning.offer(i, tokens=pool[rank], now=float(i), key=rank):
            taken.append(result.item)
    popular = ranks[taken] < 100
    assert taken[0] >= 600
    assert abs(popular[:300].mean() - popular[300:].mean()) < 0.08


def test_a_new_system_prompt_makes_no_duplicates_and_is_no_part_of_what_is_compared():
    thinning: Thinning = Thinning(warm_up=64)
    own = [prompt(30) for _ in range(600)]
    systems = [prompt(454), prompt(555)]
    accepted, kept = [], []
    for i, words in enumerate(own):
        result = thinning.offer(i, tokens=np.concatenate((systems[i // 300], words)), now=0.0)
        if result:
            accepted.append(result.item)
            kept.append(len(result.own))
    assert len(accepted) >= 0.97 * (600 - 64 - 8)
    assert kept == [30] * len(kept)
    assert thinning.acceptance.alarms == 0 and thinning.opening.share.alarms == 1


def wordings(rng, count, different=40):
    """Prompts of a template, one of 40 beginnings, and words of their own; and how long those two are together."""
    begins, prompts = [prompt(k, rng) for k in rng.integers(4, 16, different)], []
    for _ in range(count):
        begin, words = begins[rng.integers(different)], prompt(20, rng)
        prompts.append((np.concatenate((HEAD, begin, words, HEAD)), len(begin) + 20))
    return prompts


@pytest.mark.parametrize("different", [40, 6])
def test_frequent_wording_is_a_prompts_own_always(different):
    """Each beginning is in 2.5 % of the prompts: 1.8 of the recent 72; or in a sixth: 12, and now and then 18."""
    thinning: Thinning = Thinning(warm_up=64, interval=0)
    kept = []
    for tokens, own in wordings(np.random.default_rng(0), 1500, different):
        if result := thinning.offer(own, tokens=tokens, now=0.0):
            kept.append(len(result.own) - result.item)
    assert kept == [0] * len(kept) and len(kept) > 1200


def test_what_a_half_share_is_cut_out_always_or_never():
    """As a prompt of an application that half of the requests come from; its share swings around a half."""
    rng, opening, thinning = np.random.default_rng(1), prompt(12), Thinning(warm_up=64, interval=0)
    kept = []
    for _ in range(3000):
        begin = opening if rng.random() < 0.5 else prompt(0)
        if result := thinning.offer(0, tokens=np.concatenate((HEAD, begin, prompt(20, rng), HEAD)), now=0.0):
            kept.append(len(result.own))
    assert kept == [20] * len(kept) and len(kept) > 2500


def test_a_short_system_prompt_that_is_new_is_no_part_of_what_is_compared():
    thinning, kept = Thinning(warm_up=64, interval=0), []
    for i, (tokens, own) in enumerate(wordings(np.random.default_rng(2), 600)):
        system = np.concatenate((HEAD, SYSTEM, tokens)) if i >= 300 else tokens
        if result := thinning.offer(own, tokens=system, now=0.0):
            kept.append(len(result.own) - result.item)
    assert kept == [0] * len(kept) and len(kept) > 450


def test_a_popular_long_prompt_is_no_opening():
    """Whether it is left out depends on the last requests alone, not on what is shared."""
    rng, popular, came, last = np.random.default_rng(3), prompt(60), [], -1000
    thinning, taken = Thinning(warm_up=64, interval=0), []
    for i in range(4000):
        if again := rng.random() < 1 / 40:
            if i - last > 64 and 64 <= i < 3990:
                came.append(i)
            last = i
        result = thinning.offer(i, tokens=np.concatenate((HEAD, popular if again else prompt(20), HEAD)), now=0.0)
        if result and len(result.own) != 20:
            taken.append((result.item, len(result.own)))
    assert taken == [(i, 60) for i in came] and len(taken) > 10


def test_a_system_prompt_with_the_time_in_it_is_shared_too():
    thinning: Thinning = Thinning(numbers=DIGITS)
    head, middle = prompt(100), prompt(100)
    kept = []
    for i in range(100):
        time = RNG.integers(100, 110, RNG.integers(1, 5))
        words = np.concatenate((head, time, middle, prompt(30)))
        if result := thinning.offer(i, tokens=words, now=0.0):
            kept.append(len(result.own))
    assert kept == [30] * len(kept) and len(kept) > 80


def test_near_duplicates_with_other_numbers_are_left_out():
    thinning: Thinning = Thinning(numbers=DIGITS)
    before = [prompt() for _ in range(100)]
    head, tail = prompt(12), prompt(8)
    burst = [np.concatenate((head, RNG.integers(100, 110, RNG.integers(1, 7)), tail)) for _ in range(300)]
    taken = offered(thinning, [*before, *burst])
    assert len([i for i in taken if i >= 100]) <= 1 and len(taken) >= 100


def test_prompts_of_numbers_alone_are_prompts_too():
    thinning: Thinning = Thinning(numbers=DIGITS, window=5)
    taken = offered(thinning, [[100 + i % 10] for i in range(3)] + [prompt() for _ in range(10)] + [[107, 108]])
    assert taken == [0, *range(3, 14)]


def test_an_asker_is_taken_once_in_an_interval():
    thinning: Thinning = Thinning(interval=60, window=1, ahead=0)
    taken = [now for now in range(0, 200, 10) if thinning.offer(now, tokens=prompt(), now=float(now), key=7)]
    assert taken == [0, 60, 120, 180]
    assert thinning.offer("other", tokens=prompt(), now=181.0, key=8).item == "other"
    assert thinning.counts["same_conversation"] == 16
    rare: Thinning = Thinning(interval=60, window=10, ahead=0)
    taken = [now for now in range(0, 3000, 100) if rare.offer(now, tokens=prompt(), now=float(now), key=7)]
    assert taken == [0, 1100, 2200], "however slow the traffic is, others come between"


def test_what_is_accepted_collapses_with_an_alarm():
    thinning: Thinning = Thinning()
    offered(thinning, [prompt() for _ in range(700)])
    assert thinning.acceptance.before > 0.99
    again = prompt()
    offered(thinning, [again] * 300)
    assert thinning.acceptance.alarms == 0, "a burst passes"
    offered(thinning, [again] * 300)
    assert thinning.acceptance.alarms == 1 and thinning.acceptance.share < 1 / 3


def test_it_goes_on_where_it_was_from_its_arrays():
    rng = np.random.default_rng(5)
    system, pool = prompt(100, rng), [prompt(15, rng) for _ in range(150)]
    stream = [np.concatenate((system, pool[rng.integers(150)])) for _ in range(900)]
    keys = rng.integers(0, 200, 900).tolist()
    whole: Thinning = Thinning(warm_up=64, interval=50)
    first: Thinning = Thinning(warm_up=64, interval=50)
    expected = [whole.offer(i, tokens=t, now=float(i), key=keys[i]) for i, t in enumerate(stream)]
    for i in range(450):
        first.offer(i, tokens=stream[i], now=float(i), key=keys[i])
    first.flush()
    state = {name: value.copy() for name, value in first.state().items()}
    assert sum(value.nbytes for value in state.values()) < 400_000
    second: Thinning = Thinning(warm_up=64, interval=50)
    second.restore(state)
    after = [second.offer(i, tokens=stream[i], now=float(i), key=keys[i]) for i in range(450, 900)]
    later = [result.item for result in expected if result and result.item >= 450]
    assert [result.item for result in after if result] == later and len(later) > 50
    assert whole.flush() and second.flush()
    assert second.counts == whole.counts
    heir: Thinning = Thinning(warm_up=64)
    heir.restore(inherited(state))
    assert heir.counts == counts(), "an heir has counted nothing"
    assert heir.offer(0, tokens=stream[449], now=450.0) is None
    assert heir.flush() == [] and heir.counts == counts(repeated=1), "and remembers what came"


def task(rng):
    """A prompt of an adapter for one task: one of thirty things, one of ten ways to say when, and two words."""
    thing, way = rng.integers(30) * 9, rng.integers(10) * 9
    return np.concatenate((HEAD, thing + np.arange(300, 309), way + np.arange(600, 609), rng.integers(1000, 3000, 2)))


def test_of_a_narrow_task_most_prompts_are_taken_and_still_none_that_comes_twice():
    thinning, rng = Thinning(warm_up=64), np.random.default_rng(7)
    taken = len(offered(thinning, [task(rng) for _ in range(1000)]))
    assert taken > 750, "where each was held against the 64 before it, 585 were"
    again_soon = []
    for _ in range(100):
        first = task(rng)
        again_soon += [first, *(task(rng) for _ in range(3)), np.append(first[:-1], 3001)]
    assert sum(number % 5 == 4 for number in offered(thinning, again_soon)) < 25
    again = Thinning()
    again.restore(thinning.state())
    assert abs(len(offered(again, [task(rng) for _ in range(1000)])) - taken) < 100, "also after a restart"


def test_memory_is_bounded():
    thinning: Thinning = Thinning(window=100)
    for i in range(3000):
        thinning.offer(i, tokens=prompt(), now=float(i), key=i)
    assert len(thinning._prompts) <= 101 and len(thinning._bands) <= 404 and len(thinning._askers) <= MOST_BETWEEN + 1
    assert sum(value.nbytes for value in thinning.state().values()) < 580_000


def test_openings_are_known_after_a_restart_and_to_the_next_version():
    thinning, rng = Thinning(), np.random.default_rng(3)
    for number in range(40):
        thinning.offer(number, tokens=[*range(100, 120), *rng.integers(1000, 9000, 12)], now=number)
    assert thinning.shared.openings
    for state in (thinning.state(), inherited(thinning.state())):
        again = Thinning()
        again.restore(state)
        assert again.shared.openings == thinning.shared.openings
