"""Ratings find their request, and nothing of what was asked or answered is kept for it."""

from __future__ import annotations

import tracemalloc

import pytest

from serve.asgi.exchange import Exchange, Generation
from serve.dataset.feedback import Feedback
from serve.errors import NotFound


def exchange(number: int, asker: bytes, text: str = "Paris.") -> Exchange:
    made = Generation([1, 2], [3], "stop", text)
    return Exchange("tone", "v1", 200, 0.1, 0.2, "", f"r-{number}", "acme", asker, 0.0, (made,), True)


def test_two_thousand_large_prompts_leave_a_few_hundred_bytes_each():
    feedback, size = Feedback(), 100_000
    tracemalloc.start()
    try:
        for number in range(2000):
            feedback.remember(exchange(number, number.to_bytes(4, "big") * (size // 4), "an answer " * 1000))
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 2000 * 2000, f"{held >> 10} KiB"
    assert {len(one.asker) for one in feedback._recent.values()} == {16}


def test_one_asker_is_the_same_one_in_every_rating():
    feedback = Feedback()
    for number, asker in enumerate((b"anna", b"bo", b"anna")):
        feedback.remember(exchange(number, asker))
    anna, bo, again = (feedback.join("acme", f"r-{number}", 1.0, None)[0].asker for number in range(3))
    assert anna == again != bo


def test_the_oldest_is_forgotten():
    feedback = Feedback(memory=2)
    for number in range(3):
        feedback.remember(exchange(number, b"anna"))
    with pytest.raises(NotFound):
        feedback.join("acme", "r-0", 1.0, None)
    assert feedback.join("acme", "r-2", None, "paris")[1] == 1.0
