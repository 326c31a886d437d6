"""Ratings find their request, and nothing of what was asked or answered is kept for it."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

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
    assert {len(one.asker) for one in feedback._recent["acme"].by_id.values()} == {16}


def test_one_asker_is_the_same_one_in_every_rating():
    feedback = Feedback()
    for number, asker in enumerate((b"anna", b"bo", b"anna")):
        feedback.remember(exchange(number, asker))
    anna, bo, again = (feedback.join("acme", "", f"r-{number}", 1.0, None)[0].asker for number in range(3))
    assert anna == again != bo


def test_the_oldest_is_forgotten():
    feedback = Feedback(memory=2)
    for number in range(3):
        feedback.remember(exchange(number, b"anna"))
    with pytest.raises(NotFound):
        feedback.join("acme", "", "r-0", 1.0, None)
    assert feedback.join("acme", "", "r-2", None, "paris")[1] == 1.0


def test_a_tenant_makes_none_of_anothers_requests_forgotten():
    feedback = Feedback(memory=2)
    feedback.remember(exchange(0, b"anna"))
    for number in range(1, 6):
        feedback.remember(replace(exchange(number, b"flood"), tenant="globex"))
    assert feedback.join("acme", "", "r-0", 1.0, None)[1] == 1.0


def test_a_clients_own_id_finds_its_request_and_no_other_key_can_take_it():
    feedback = Feedback(memory=4)
    feedback.remember(replace(exchange(0, b"anna", "right"), client_id="order-7", key="shop"))
    feedback.remember(replace(exchange(1, b"poison", "poison"), client_id="order-7", key="stranger"))
    feedback.remember(replace(exchange(2, b"poison", "poison"), client_id="r-0", key="stranger"))
    with pytest.raises(NotFound):
        feedback.join("acme", "third", "order-7", 1.0, None)
    assert feedback.join("acme", "shop", "order-7", 1.0, None)[0].id == "r-0"
    assert feedback.join("acme", "stranger", "order-7", 1.0, None)[0].id == "r-1"
    with pytest.raises(NotFound):  # the server's own ids go first: it is rated already
        feedback.join("acme", "stranger", "r-0", 1.0, None)
    for number in range(3, 7):
        feedback.remember(replace(exchange(number, b"bo"), client_id=f"order-{number}"))
    assert len(feedback._recent["acme"].by_id) == 4 == len(feedback._recent["acme"].named)
