"""How far a shadow's answer agrees with the client's, token by token."""

from __future__ import annotations

import random

import pytest

from serve.asgi.exchange import Generation
from serve.rollout.shadow_agreement import PAIRS, ShadowAgreement, agreement


def slow_edits(first, second):
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        last, row[0] = row[0], i
        for j, b in enumerate(second, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (a != b))
    return row[-1]


@pytest.mark.parametrize(
    ("live", "shadow", "exact", "prefix", "edit", "length"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], 1, 1, 1, 1),
        ([1, 2, 3, 4], [1, 2, 9, 4], 0, 0.5, 0.75, 1),
        ([1, 2], [1, 2, 3, 4], 0, 0.5, 0.5, 2),
        ([1, 2, 3, 4], [9, 1, 2, 3, 4], 0, 0, 0.8, 1.25),
        ([], [], 1, 1, 1, 0),
        ([1], [], 0, 0, 0, 0),
    ],
)
def test_two_answers_agree_exactly_up_to_a_token_or_but_for_edits(live, shadow, exact, prefix, edit, length):
    measured = agreement(live, shadow)
    assert (measured.exact, measured.prefix, measured.edit, measured.length) == pytest.approx(
        (exact, prefix, edit, length)
    )


def test_edits_are_levenshteins():
    lots = random.Random(0)
    for _ in range(50):
        first, second = (lots.choices(range(4), k=lots.randint(0, 30)) for _ in range(2))
        longest = max(len(first), len(second), 1)
        assert agreement(first, second).edit == pytest.approx(1 - slow_edits(first, second) / longest)


def test_greedy_and_sampled_answers_are_counted_apart_and_pairs_are_bounded():
    shadows = ShadowAgreement()
    shadows.compare(
        "tone", (1, 2), {"temperature": 0}, Generation([1], [5, 6], "stop"), Generation([1], [5, 7], "stop")
    )
    shadows.compare("tone", (1, 2), {}, Generation([1], [5, 6], "stop"), Generation([1], [5, 6], "stop"))
    shadows.compare("tone", (1, 2), {}, Generation([1], [5, 6], "abort"), Generation([1], [5, 6], "stop"))
    sampled, greedy = shadows.report("tone")
    assert (greedy["sampling"], greedy["requests"], greedy["exact_agreement"]) == ("greedy", 1, 0)
    assert (sampled["sampling"], sampled["requests"], sampled["exact_agreement"]) == ("sampled", 1, 1)
    for version in range(3, 3 + PAIRS):
        shadows.compare("tone", (1, version), {}, Generation([1], [5], "stop"), Generation([1], [5], "stop"))
    assert len(shadows.report("tone")) == PAIRS
