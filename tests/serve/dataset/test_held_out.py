"""What builds held out is remembered on all servers, by conversation, until that is deleted or its days are over."""

from __future__ import annotations

import base64
import json

import pytest

from serve.adapters.registry.registry import Registry
from serve.dataset import held_out
from serve.dataset.held_out import DAY, HeldOut
from serve.dataset.near import sketch


@pytest.fixture
def held(url):
    with Registry(url) as registry:
        yield HeldOut(registry, days=30)


def known(held: HeldOut, now: float = 0.0) -> list[tuple[str, bytes]]:
    return [(conversation, one.exact) for conversation, one in held.entries("tone", now)]


def test_a_question_of_two_conversations_stays_until_both_are_deleted(held):
    one = sketch("what is held out?")
    for _ in range(2):
        held.add("tone", [("conv-a", one), ("conv-b", one)], now=0.0)
        assert known(held) == [("conv-a", one.exact), ("conv-b", one.exact)]
    held.forget("conv-b")
    assert known(held) == [("conv-a", one.exact)]
    held.forget("conv-a")
    assert known(held) == []


def test_an_entry_goes_after_its_days_unless_it_was_held_out_again(held):
    first, second = sketch("the first"), sketch("the second")
    held.add("tone", [("conv-a", first), ("conv-b", second)], now=0.0)
    held.add("tone", [("conv-b", second)], now=DAY)
    assert known(held, 30 * DAY) == [("conv-b", second.exact)]
    assert held.entries("other", 0.0) == []


def test_what_one_server_held_out_another_one_does_not_train_on(held, url):
    one = sketch("what is held out?")
    held.add("tone", [("conv-a", one)], now=0.0)
    with Registry(url) as registry:
        ((conversation, there),) = HeldOut(registry, days=30).entries("tone", 0.0)
    assert (conversation, there.exact, there.bound) == ("conv-a", one.exact, one.bound)
    assert (there.shingles == one.shingles).all()


def test_the_latest_entries_are_kept(held, monkeypatch):
    monkeypatch.setattr(held_out, "MOST", 3)
    for number in range(5):
        held.add("tone", [(f"conv-{number}", sketch(f"question {number}"))], now=0.0)
    assert [conversation for conversation, _ in known(held)] == ["conv-2", "conv-3", "conv-4"]


def test_files_of_an_earlier_release_are_taken_over_once(held, tmp_path):
    one = sketch("what is held out?")
    row = {"conversation": "conv-a", "moment": 0.0, "exact": one.exact.hex(), "bound": int(one.bound)}
    row["shingles"] = base64.b64encode(one.shingles.astype("<u8").tobytes()).decode()
    (tmp_path / f"{held_out._key('tone')}.jsonl").write_text(json.dumps(row) + "\n")
    for _ in range(2):
        held.adopt(tmp_path)
        assert known(held) == [("conv-a", one.exact)] and not list(tmp_path.glob("*.jsonl"))
