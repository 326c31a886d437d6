"""What recent prompts begin and end with alike is known, and leaves each prompt's own tokens."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest

from serve.drift.features.shared_ends import (
    AHEAD,
    LOOKED_BACK,
    MOST_ENDS,
    MOST_TOKENS,
    Read,
    SharedEnds,
    Words,
    own_tokens,
    skipped,
)

RNG = np.random.default_rng(0)
DIGITS = np.zeros(101, np.bool_)
DIGITS[10:20] = True


def prompt(length, rng=RNG):
    return rng.integers(100, 40_000, length)


def joined(*parts):
    return np.concatenate(parts).astype(np.int64)


def split(prompts, numbers=None):
    """The own tokens of each prompt, with those around it."""
    return [tokens.tolist() for tokens in own_tokens(prompts, numbers)]


def test_a_number_is_one_symbol_whatever_its_digits():
    short, long = Words.of([5, 11, 6], DIGITS), Words.of([5, 19, 18, 17, 6, 10], DIGITS)
    assert short.symbols.tolist() == [5, -1, 6] and long.symbols.tolist() == [5, -1, 6, -1]
    assert long.kept(0, 2).tolist() == [5, 19, 18, 17] and long.kept(1, 3).tolist() == [19, 18, 17, 6]
    assert long.kept(2, 4).tolist() == [6, 10] and long.kept(1, 1).tolist() == []
    assert Words.of([999, -3], DIGITS).symbols.tolist() == [999, -3]


def test_template_instructions_and_end_are_shared_and_nothing_else():
    head, tail = prompt(300), prompt(7)
    asked = [prompt(20) for _ in range(50)]
    assert split([joined(head, each, tail) for each in asked]) == [each.tolist() for each in asked]
    short = [prompt(3), prompt(1), [], prompt(50)]
    assert split(short) == [list(tokens) for tokens in short]


def test_the_runs_of_what_is_shared_are_those_of_the_opening():
    shared, head = SharedEnds(), prompt(50)
    reads = [shared.read(joined(head, prompt(20))) for _ in range(30)]
    known = [set(shared.split(read).shared_runs.tolist()) for read in reads]
    assert len(known[0]) == 45 and all(each == known[0] for each in known)


def test_a_new_opening_is_cut_out_of_the_first_prompt_that_has_it_and_the_last_one_of_the_old():
    rng, shared, waiting, found = np.random.default_rng(0), SharedEnds(), deque(), []
    for length in (8, 500, 20):
        head = prompt(length, rng)
        for _ in range(40):
            waiting.append(shared.read(joined(head, prompt(20, rng))))
            if len(waiting) > AHEAD:
                found.append(len(shared.split(waiting.popleft()).tokens))
    assert found == [20] * (3 * 40 - AHEAD)


@pytest.mark.parametrize(
    "shell",
    [
        lambda head, tail, name, i: (head, []),
        lambda head, tail, name, i: (joined(name[i % 3], head), tail),
        lambda head, tail, name, i: (joined(head[:2], name[i % 3], head[2:]), tail),
        lambda head, tail, name, i: (joined(head[:50], name[i % 3], head[50:]), tail),
        lambda head, tail, name, i: (head, joined(tail[:20], name[i % 2], tail[20:])),
        lambda head, tail, name, i: (joined(head[:20], head[20 : 200 * (i % 2)], head[-30:]), tail),
    ],
    ids=["nothing behind", "a name first", "a name near the beginning", "in the middle", "behind", "an optional part"],
)
def test_an_opening_with_variants_is_shared_in_each(shell):
    head, tail, name = prompt(300), prompt(40), [prompt(1) for _ in range(3)]
    asked = [prompt(20) for _ in range(100)]
    prompts = []
    for i, each in enumerate(asked):
        before, behind = shell(head, tail, name, i)
        prompts.append(joined(before, each, behind))
    assert split(prompts) == [each.tolist() for each in asked]


def test_the_openings_of_several_tenants_are_shared_where_few_have_them():
    rng, heads = np.random.default_rng(1), [prompt(length) for length in (300, 200, 100, 80)]
    asked, prompts = [], []
    for _ in range(600):
        asked.append(prompt(20, rng))
        prompts.append(joined(heads[rng.choice(4, p=(0.5, 0.25, 0.15, 0.1))], asked[-1]))
    found = split(prompts)
    assert np.mean([own == each.tolist() for own, each in zip(found, asked, strict=True)]) > 0.97


def test_words_that_some_prompts_begin_with_are_their_own():
    rng, begin, what = np.random.default_rng(2), prompt(12), prompt(2)
    wording = [joined(begin, prompt(20, rng)) if rng.random() < 0.15 else prompt(32, rng) for _ in range(400)]
    assert split(wording) == [tokens.tolist() for tokens in wording]
    # Also right behind an opening, where fewer than most of the questions do.
    head = prompt(100)
    asked = [joined(what, prompt(20, rng)) if rng.random() < 0.5 else prompt(22, rng) for _ in range(200)]
    assert split([joined(head, each) for each in asked]) == [each.tolist() for each in asked]


def test_a_popular_prompt_has_no_opening():
    rng, popular = np.random.default_rng(3), prompt(60)
    prompts = [popular if rng.random() < 0.3 else prompt(60, rng) for _ in range(200)]
    assert split(prompts) == [tokens.tolist() for tokens in prompts]


def test_prompts_that_are_shared_altogether_have_nothing_of_their_own():
    shared, head = SharedEnds(), prompt(40)
    reads = [shared.read(joined(head, prompt(20))) for _ in range(30)]
    alone = shared.read(head)
    own = shared.split(alone)
    assert len(own.tokens) == 0 and not own.whole and not own.words and len(reads) == 30


def test_with_numbers_in_it_an_opening_is_the_same():
    head, middle = np.full(30, 30), np.full(30, 40)
    asked = [RNG.integers(50, 100, 20) for _ in range(60)]
    times = [RNG.integers(10, 20, RNG.integers(1, 5)) for _ in asked]
    prompts = [joined(head, time, middle, each) for time, each in zip(times, asked, strict=True)]
    assert split(prompts, DIGITS) == [each.tolist() for each in asked]


def test_what_is_kept_are_hashes_of_the_recent_prompts():
    shared = SharedEnds()
    for _ in range(500):
        shared.read(prompt(30))
    assert len(shared._recent) == LOOKED_BACK + AHEAD + 1
    assert not any(len(read.words.tokens) + len(read.words.symbols) for read in shared._recent)


def test_of_a_very_long_prompt_both_ends_are_looked_at():
    tokens = prompt(20_000)
    words = Words.of(tokens)
    assert len(words.tokens) == MOST_TOKENS and skipped(tokens) == 20_000 - MOST_TOKENS
    assert words.tokens[0] == tokens[0] and words.tokens[-1] == tokens[-1]


def test_own_tokens_of_a_short_list_are_all_of_them():
    head = prompt(100)
    assert split([]) == [] and [len(own) for own in split([joined(head, prompt(20)) for _ in range(2)])] == [120, 120]


def test_what_prompts_shared_is_left_out_of_one_that_is_none_of_them():
    rng = np.random.default_rng(3)
    template, closing = np.arange(100, 120), np.arange(200, 210)
    shared = SharedEnds()
    assert shared.own(Read.of([1, 2, 3])).tolist() == [1, 2, 3]
    for _ in range(30):
        shared.split(shared.read([*template, *rng.integers(1000, 9000, 12), *closing]))
    assert shared.own(Read.of([*template, 7, 8, 9, *closing])).tolist() == [7, 8, 9]
    assert shared.own(Read.of([*template, 7])).tolist() == [7]
    assert shared.own(Read.of([*template])).tolist() == []
    assert shared.own(Read.of([*template[1:], 7])).tolist() == [*template[1:], 7]
    for number in range(30):  # other openings take the place of those that are no more
        for _ in range(8):
            shared.split(shared.read([*range(500 * number, 500 * number + 10), *rng.integers(20_000, 90_000, 12)]))
    assert len(shared.openings) <= MOST_ENDS and len(shared.endings) <= MOST_ENDS
