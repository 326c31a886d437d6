"""What recent prompts share is known, and leaves each prompt's own tokens."""

from __future__ import annotations

import numpy as np

from serve.drift.token_runs import MOST_TOKENS, RUN, SharedRuns, Words, own_tokens, skipped

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
