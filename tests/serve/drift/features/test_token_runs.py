"""What recent prompts share is known, and leaves each prompt's own tokens."""

from __future__ import annotations

from collections import Counter, deque

import numpy as np
import pytest

from serve.drift.features.token_runs import AHEAD, LATELY, MOST_TOKENS, RUN, SharedRuns, Words, own_tokens, skipped

RNG = np.random.default_rng(0)
DIGITS = np.zeros(101, np.bool_)
DIGITS[10:20] = True


def prompt(length):
    return RNG.integers(100, 40_000, length)


def test_a_number_is_one_symbol_whatever_its_digits():
    short, long = Words.of([5, 11, 6], DIGITS), Words.of([5, 19, 18, 17, 6, 10], DIGITS)
    assert short.symbols.tolist() == [5, -1, 6] and long.symbols.tolist() == [5, -1, 6, -1]
    assert long.kept(np.array([True, True, False, True])).tolist() == [5, 19, 18, 17, 10]
    assert Words.of([999, -3], DIGITS).symbols.tolist() == [999, -3]


def test_template_system_prompt_and_end_are_shared_and_nothing_else():
    head, tail, shared = prompt(300), prompt(5), SharedRuns()
    prompts = [np.concatenate((head, prompt(20), tail)) for _ in range(50)]
    for tokens in prompts:
        shared.learn(Words.of(tokens).runs())
    words = Words.of(prompts[7])
    assert words.kept(words.own(shared.among(words.runs()))).tolist() == prompts[7][300:320].tolist()
    for tokens in (prompt(3), prompt(1), [], prompt(50)):
        words = Words.of(tokens)
        assert words.kept(words.own(shared.among(words.runs()))).tolist() == list(tokens)


def test_a_run_that_a_prompt_repeats_counts_once():
    shared, words = SharedRuns(), Words.of(np.tile(prompt(10), 20))
    shared.learn(words.runs())
    assert not shared.among(words.runs()).any()


def test_what_is_shared_no_longer_is_forgotten():
    shared, head = SharedRuns(), prompt(50)
    for _ in range(300):
        shared.learn(Words.of(np.concatenate((head, prompt(20)))).runs())
    runs = Words.of(np.concatenate((head, prompt(20)))).runs()
    assert shared.among(runs).sum() == 46
    for _ in range(1000):
        shared.learn(Words.of(prompt(70)).runs())
    assert not shared.among(runs).any()


def test_long_prompts_that_have_nothing_in_common_share_nothing():
    shared, share = SharedRuns(), []
    for i in range(200):
        runs = Words.of(prompt(2000)).runs()
        shared.learn(runs)
        if i > 100:
            share.append(shared.among(runs).mean())
    assert np.mean(share) < 0.001
    head = prompt(500)
    for _ in range(12):
        shared.learn(Words.of(np.concatenate((head, prompt(2000)))).runs())
    words = Words.of(np.concatenate((head, prompt(2000))))
    assert abs(words.own(shared.among(words.runs())).sum() - 2000) < 20


def test_no_token_of_a_new_opening_is_left_to_its_prompts():
    """Its last one lies in a single run, which shares its places with others of this opening and of the one before."""
    rng, left = np.random.default_rng(0), Counter()
    for _ in range(100):
        shared = SharedRuns()
        for count in (40, LATELY):
            head = rng.integers(100, 40_000, 500)
            read = [shared.read(np.concatenate((head, rng.integers(100, 40_000, 20)))) for _ in range(count)]
            left.update(len(shared.split(*each).tokens) for each in read)
            shared.fix()
    assert left == {20: 100 * (40 + LATELY)}


def test_a_short_opening_is_cut_out_of_the_last_prompts_that_have_it_and_the_first_that_have_another():
    rng, shared, waiting, found = np.random.default_rng(0), SharedRuns(), deque(), []
    for number in range(6):
        head = rng.integers(100, 40_000, 8)
        for _ in range(40):
            waiting.append(shared.read(np.concatenate((head, rng.integers(100, 40_000, 20)))))
            if len(waiting) > AHEAD:
                found.append(len(shared.split(*waiting.popleft()).tokens))
        if not number:
            shared.fix()
    assert found == [20] * (6 * 40 - AHEAD)


def shells(head, tail, variants):
    """What stands before and behind each question: one of so many variants of an opening, in equal parts."""
    name = [prompt(1) for _ in range(3)]
    return {
        "one": lambda i: (head, tail),
        "none behind": lambda i: (head, []),
        "a name near the beginning": lambda i: (np.concatenate((head[:2], name[i % 3], head[2:])), tail),
        "a name near the end": lambda i: (head, np.concatenate((tail[:8], name[i % 2], tail[8:]))),
        "a name in the middle": lambda i: (np.concatenate((head[:50], name[i % 3], head[50:])), tail),
        "an optional part": lambda i: (np.concatenate((head[:20], head[20 : 200 * (i % 2)], head[-5:])), tail),
    }[variants]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("between", [0, 2, 9])
@pytest.mark.parametrize(
    "variants",
    [
        "one",
        "none behind",
        "a name near the beginning",
        "a name near the end",
        "a name in the middle",
        "an optional part",
    ],
)
def test_words_that_many_prompts_begin_or_end_with_are_their_own_in_every_shell(between, variants, seed):
    """between: tokens that stand before every question, whatever the opening is."""
    rng, shared = np.random.default_rng(seed), SharedRuns()
    same, end = prompt(between), prompt(1)
    what = prompt(1)
    begins = [what, np.concatenate((what, prompt(1))), np.concatenate((what, prompt(2))), prompt(5), prompt(0)]
    for number in range(3):
        # What is fixed are the variants of the first shell.
        shell, read, own = shells(prompt(300), prompt(10), "one" if number else variants), [], []
        for i in range(100):
            begin = begins[rng.choice(5, p=(0.15, 0.15, 0.27, 0.27, 0.16))]
            before, behind = shell(i)
            own.append(np.concatenate((begin, prompt(20), end[: rng.integers(2)])))
            read.append(shared.read(np.concatenate((before, same, own[-1], behind)).astype(np.int64)))
        shared.fix()
        found = [shared.split(*each).tokens.tolist() for each in read]
        assert found == [tokens.tolist() for tokens in own], number


def of_wording(share, count=2000):
    """Prompts of which so many begin alike, and that beginning."""
    rng, begin = np.random.default_rng(0), prompt(12)
    return [np.concatenate((begin, prompt(20))) if rng.random() < share else prompt(32) for _ in range(count)], begin


def test_what_was_fixed_is_shared_for_ever_and_keeps_its_place():
    (prompts, begin), shared = of_wording(0.4, 100), SharedRuns()
    for tokens in prompts:
        shared.learn(Words.of(tokens).runs())
    runs = Words.of(begin).runs()
    assert not shared.among(runs).any(), "fewer than half of the prompts hold it"
    shared.fix()
    for _ in range(2000):
        shared.learn(Words.of(prompt(200)).runs())
    again = SharedRuns.from_state(shared.state())
    for table in (shared, again):
        assert table.among(runs).tolist() == [True] * (len(runs) - 1) + [False]


def test_with_stretches_of_one_run_wording_is_shared_while_four_recent_prompts_hold_it_as_earlier():
    prompts, begin = of_wording(0.025)
    shared, earlier, cut = SharedRuns(), SharedRuns(stretch=RUN), [0, 0]
    for tokens in prompts:
        runs = Words.of(tokens).runs()
        for i, table in enumerate((shared, earlier)):
            table.learn(runs)
            cut[i] += bool(table.among(Words.of(begin).runs()).any())
    assert cut[0] == 0 and 200 < cut[1] < 1800


def test_it_goes_on_for_long_and_from_its_arrays():
    shared, head = SharedRuns(), prompt(20)
    for _ in range(15_000):  # its unit outgrows what a float32 holds several times
        shared.learn(Words.of(np.concatenate((head, prompt(5)))).runs())
    runs = Words.of(head).runs()
    again = SharedRuns.from_state(shared.state())
    assert shared.among(runs)[:-1].all() and np.array_equal(shared.among(runs), again.among(runs))
    for table in (shared, again):
        table.learn(runs)
    assert shared.among(runs)[-1] == again.among(runs)[-1]
    assert shared.state().keys() == again.state().keys()


def test_of_a_very_long_prompt_both_ends_are_looked_at():
    tokens = prompt(20_000)
    words = Words.of(tokens)
    assert len(words.tokens) == MOST_TOKENS and skipped(tokens) == 20_000 - MOST_TOKENS
    assert words.tokens[0] == tokens[0] and words.tokens[-1] == tokens[-1]


def test_the_table_of_an_earlier_release_goes_on():
    head, prompts = prompt(60), [prompt(20) for _ in range(100)]
    shared, earlier = SharedRuns(stretch=RUN), SharedRuns(stretch=RUN)
    for tokens in prompts:
        shared.learn(Words.of(np.concatenate((head, tokens))).runs())
    state = {name: values for name, values in shared.state().items() if name in ("places", "tags", "counts")}
    earlier = SharedRuns.from_state(state, stretch=RUN)
    for tokens in prompts[:4]:
        runs = Words.of(np.concatenate((head, tokens[:3]))).runs()
        assert np.array_equal(shared.among(runs), earlier.among(runs)) and earlier.among(runs).any()


def test_what_an_earlier_release_has_fixed_is_shared_as_it_was(monkeypatch):
    head, begin, earlier = prompt(100), prompt(2), SharedRuns()
    monkeypatch.setattr(earlier, "_questions", list)
    prompts = [np.concatenate((head, begin[: 2 * (i % 2)], prompt(20))) for i in range(100)]
    read = [earlier.read(tokens) for tokens in prompts]
    earlier.fix()
    again, heir = SharedRuns.from_state(earlier.state()), SharedRuns()
    heir.fix_as(earlier.state())
    for table in (earlier, again, heir):
        table.fix()
        assert {len(table.split(*each).tokens) for each in read} == {20}


def test_own_tokens_of_a_list_of_prompts():
    head = prompt(100)
    prompts = [np.concatenate((head, prompt(20))) for _ in range(30)]
    own = list(own_tokens(prompts, SharedRuns()))
    assert [tokens.tolist() for tokens in own] == [tokens[100:].tolist() for tokens in prompts]
    assert list(own_tokens([], SharedRuns())) == []
    # What 0.4 of a list share is cut out of its first prompts too.
    assert {len(tokens) for tokens in own_tokens(of_wording(0.4, 300)[0], SharedRuns())} == {20, 32}
    few = list(own_tokens([np.concatenate((head, prompt(20))) for _ in range(2)], SharedRuns()))
    assert [len(tokens) for tokens in few] == [120, 120]
