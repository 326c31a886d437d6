"""A detector sees neither repeats, nor near-repeats, nor one asker twice in an interval."""

from __future__ import annotations

import numpy as np
import pytest

from serve.drift.thinning import Thinning, common_runs

RNG = np.random.default_rng(0)


def prompt(length=40):
    return RNG.integers(0, 30_000, length)


def offered(thinning, prompts, *, step=1000.0, key=None):
    return [
        item for i, tokens in enumerate(prompts) for item in thinning.offer(i, tokens=tokens, now=i * step, key=key)
    ]


def test_a_prompt_is_taken_once():
    thinning: Thinning = Thinning(block=1)
    a, b = prompt(), prompt()
    assert offered(thinning, [a, b, a, a.tolist(), b]) == [0, 1]
    assert thinning.counts == {"accepted": 2, "repeated": 3, "near_duplicate": 0, "same_conversation": 0}


def test_a_prompt_with_a_few_other_words_is_taken_once():
    thinning: Thinning = Thinning(block=1)
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
    thinning: Thinning = Thinning(block=1)
    assert len(offered(thinning, [prompt() for _ in range(1000)])) == 1000
    short: Thinning = Thinning(block=1)
    assert len(offered(short, [[i] for i in range(50)] + [[i, 1] for i in range(50)] + [[]])) == 101


def test_a_shared_system_prompt_makes_no_duplicates_once_it_is_known():
    system = prompt(300)
    prompts = [np.concatenate((system, prompt(30))) for _ in range(200)]
    assert len(offered(Thinning(block=1), prompts)) < 20
    assert len(offered(Thinning(block=1, ignore=common_runs(prompts[:100])), prompts)) > 195


def test_an_asker_is_taken_once_in_an_interval():
    thinning: Thinning = Thinning(interval=60, block=1)
    taken = [now for now in range(0, 200, 10) if thinning.offer(now, tokens=prompt(), now=float(now), key="ada")]
    assert taken == [0, 60, 120, 180]
    assert thinning.offer("other", tokens=prompt(), now=181.0, key="bob") == ["other"]
    assert thinning.counts["same_conversation"] == 16


def test_blocks_come_shuffled_and_whole():
    thinning: Thinning = Thinning(block=8, seed=1)
    out = offered(thinning, [prompt() for _ in range(84)])
    assert len(out) == 80 and out != sorted(out)
    assert all(sorted(out[i : i + 8]) == list(range(i, i + 8)) for i in range(0, 80, 8))
    assert sorted(thinning.flush()) == [80, 81, 82, 83] and thinning.flush() == []


def test_memory_is_bounded():
    thinning: Thinning = Thinning(block=1, memory=100)
    for i in range(1000):
        thinning.offer(i, tokens=prompt(), now=float(i), key=i)
    assert len(thinning._prompts) == 100 and len(thinning._last) == 100 and len(thinning._bands) == 400


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="block 0"):
        Thinning(block=0)
