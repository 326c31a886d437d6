"""What copies from its prompt is drafted, and wrong drafts stop before they have cost much."""

from __future__ import annotations

import random

import pytest

from serve.cpu_kernels.drafts import CREDIT, KEPT, LEAST, MOST, RATE, Bets, Bettor, Continuations, DraftPrice

PRICE = 0.1


def after(tokens: list[int], count: int = 4) -> list[int]:
    known = Continuations()
    for token in tokens:  # as they come, one by one
        known.extend([token])
    end, length = known.longest()
    return known.after(end, count) if length else []


def test_what_followed_the_longest_run_that_ends_the_sequence_is_likely_to_follow_again():
    assert after([1, 2, 3, 4, 5, 9, 2, 3, 4, 7, 8, 1, 2, 3, 4]) == [5, 9, 2, 3], "four tokens are the same, not three"
    assert after([2, 3, 4, 5, 9, 2, 3, 4, 7, 8, 2, 3, 4]) == [7, 8, 2, 3], "of equals the latest"
    assert after([1, 2, 3, 4, 5, 6, 7, 3, 4]) == [], f"shorter than {LEAST}"
    assert after([5, 6, 5, 6, 5, 6]) == [5, 6, 5, 6], "a repetition goes on"
    assert after([]) == after([1, 2]) == []


def test_a_prompt_at_once_is_the_same_as_its_tokens_one_by_one_and_what_is_too_long_is_not_looked_through():
    tokens = [random.Random(1).randrange(5) for _ in range(300)]
    known = Continuations()
    known.extend(tokens)
    assert known.after(*known.longest()[:1], 4) == after(tokens)
    known = Continuations()
    known.extend([*range(KEPT), 7, 8, 9, 50, 60, 7, 8, 9])
    assert known.longest() == (10, 3), "the later ones are not among the places"


def play(chance: float, sequences: int, steps: int = 200, price: float = PRICE) -> tuple[float, float]:
    """Sequences of one version that repeat themselves, whose drafts are right by chance: tokens said and time taken.

    Time is in steps without drafts.
    """
    draw, bets = random.Random(2), Bets()
    said = spent = 0.0
    for _ in range(sequences):
        sequence = Bettor("tone")
        sequence.continuations.extend([1, 2, 3, 4] * 3)
        for _ in range(steps):
            drafts = bets.draft(sequence, price, MOST)
            accepted = 0
            while accepted < len(drafts) and draw.random() < chance:
                accepted += 1
            if drafts:
                bets.settle(sequence, len(drafts), accepted)
            sequence.said([1 + (len(sequence.continuations.tokens) + i) % 4 for i in range(accepted + 1)])
            said += accepted + 1
            spent += 1 + price * len(drafts)
    return said, spent


@pytest.mark.parametrize(("chance", "least"), [(0.95, 3.5), (0.8, 2.3), (0.6, 1.5)])
def test_drafts_that_are_mostly_right_are_made_long_and_save_time(chance, least):
    said, spent = play(chance, sequences=20)
    assert said / spent > least


@pytest.mark.parametrize("price", [0.05, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("chance", [0.0, 0.05, 0.3])
def test_drafts_that_are_mostly_wrong_cost_a_hundredth_and_what_a_sequence_may_lose_at_first(chance, price):
    said, spent = play(chance, sequences=20, price=price)
    assert spent - said <= RATE * said + 20 * CREDIT


def test_a_version_whose_drafts_are_wrong_is_tried_again_one_day_and_others_are_not_blamed():
    bets, price = Bets(), 0.4
    sequence = Bettor("chat", credit=1e9)
    sequence.continuations.extend([1, 2, 3, 4] * 3)
    while drafts := bets.draft(sequence, price, MOST):
        bets.settle(sequence, len(drafts), 0)
        sequence = Bettor("chat", credit=1e9, continuations=sequence.continuations)
    assert bets.draft(Bettor("extract", continuations=sequence.continuations), price, MOST)
    waited = 0
    while not bets.draft(sequence, price, MOST):
        waited += 1
        assert waited < 2000
    assert waited > 20


def test_the_price_of_a_draft_is_measured():
    cost = DraftPrice()
    assert cost.price(1) == DraftPrice.FIRST
    for _ in range(200):
        for rows in (1, 4, 9):
            cost.took(rows, 0.010 + 0.003 * (rows - 1))
    assert cost.price(1) == pytest.approx(0.3, rel=0.1)
    assert cost.price(4) == pytest.approx(4 * 0.3 / 1.9, rel=0.1), "all four wait for it"
    for _ in range(1000):
        cost.took(4, 0.02)
    assert 0.02 <= cost.price(1) <= 1
