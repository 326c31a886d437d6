"""What builds held out is remembered, by conversation, until that is deleted or its days are over."""

from __future__ import annotations

from serve.dataset.held_out import DAY, HeldOut
from serve.dataset.near import sketch


def known(held: HeldOut, now: float = 0.0) -> list[tuple[str, bytes]]:
    return [(conversation, one.exact) for conversation, one in held.entries("tone", now)]


def test_a_question_of_two_conversations_stays_until_both_are_deleted(tmp_path):
    held, one = HeldOut(tmp_path, days=30), sketch("what is held out?")
    for _ in range(2):
        held.add("tone", [("conv-a", one), ("conv-b", one)], now=0.0)
        assert known(held) == [("conv-a", one.exact), ("conv-b", one.exact)]
    held.forget("conv-b")
    assert known(held) == [("conv-a", one.exact)]
    held.forget("conv-a")
    assert known(held) == []


def test_an_entry_goes_after_its_days_unless_it_was_held_out_again(tmp_path):
    held = HeldOut(tmp_path, days=30)
    first, second = sketch("the first"), sketch("the second")
    held.add("tone", [("conv-a", first), ("conv-b", second)], now=0.0)
    held.add("tone", [("conv-b", second)], now=DAY)
    assert known(held, 30 * DAY) == [("conv-b", second.exact)]
    assert held.entries("other", 0.0) == []
