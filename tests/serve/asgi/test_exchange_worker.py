"""Observers look at exchanges in a thread of their own, and nobody waits for them."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from serve.asgi.exchange import Exchange, Generation
from serve.asgi.exchange_worker import QUEUE_SIZE, ExchangeWorker
from tests.support.waiting import eventually
from tests.support.watched_traffic import Engine, ask, push

EXCHANGE = Exchange("tone", "v1", 200, 0.1, 0.2)


class Notes:
    """Writes down what it is called for; `wait` holds the worker's thread in `observe`."""

    def __init__(self):
        self.calls = []
        self.batches = 0
        self.saved = threading.Event()
        self.wait = threading.Event()
        self.wait.set()
        self.broken = False

    def start(self):
        self.calls.append("start")

    def observe(self, exchange):
        self.wait.wait(10)
        self.calls.append(exchange)
        if self.broken:
            raise RuntimeError("this request is odd")

    def looked(self):
        self.batches += 1

    def save(self):
        self.calls.append("save")
        self.saved.set()

    def stop(self):
        self.calls.append("stop")


@pytest.fixture
def notes():
    return Notes()


def test_what_was_offered_is_looked_at_in_order_before_the_worker_stops(notes):
    worker = ExchangeWorker([notes])
    worker.offer(EXCHANGE)  # nobody looks yet
    worker.start()
    worker.start()
    worker.offer(EXCHANGE)
    worker.submit(lambda: notes.calls.append("job"))
    worker.offer(EXCHANGE)
    worker.stop()
    assert notes.calls == ["start", EXCHANGE, "job", EXCHANGE, "stop"]
    assert worker.handled == 3 and not worker.running
    worker.stop()
    assert notes.calls[-1] == "stop" and notes.calls.count("stop") == 1


def test_observers_hear_when_all_that_waited_has_been_looked_at(notes):
    worker = ExchangeWorker([notes], linger=30.0)
    worker.start()
    for expected in (1, 2):
        for _ in range(5):
            worker.offer(EXCHANGE)
        worker.settle()
        assert notes.batches == expected
    worker.stop()


def test_exchanges_wait_for_others_unless_somebody_asks_or_the_queue_is_half_full(notes):
    worker = ExchangeWorker([notes], queue_size=10, linger=3600.0)
    worker.start()
    for _ in range(3):
        worker.offer(EXCHANGE)
    assert worker.handled == 0
    worker.settle()
    assert worker.handled == 3
    for _ in range(5):
        worker.offer(EXCHANGE)
    assert eventually(lambda: worker.handled == 8)
    worker.offer(EXCHANGE)
    worker.stop()
    assert worker.handled == 9


def test_an_exchange_that_fills_half_of_the_queue_waits_for_no_others(notes):
    worker = ExchangeWorker([notes], queue_bytes=10_000, linger=30.0)
    worker.start()
    worker.offer(replace(EXCHANGE, generations=(Generation([1] * 1000, [2], "stop"),)))
    assert eventually(lambda: worker.handled == 1)
    worker.stop()


def test_the_queue_is_bounded_in_bytes_and_takes_one_exchange_however_large(notes):
    worker = ExchangeWorker([notes], queue_bytes=10_000)
    large = Exchange("tone", "v1", 200, 0.1, 0.2, generations=(Generation([1] * 1000, [2], "stop"),))
    worker.start()
    notes.wait.clear()
    for _ in range(10):
        worker.offer(large)
    assert worker.dropped == 9
    notes.wait.set()
    worker.settle()
    assert notes.calls.count(large) == 1
    worker.offer(replace(large, generations=(Generation([1] * 100_000, [2], "stop"),)))
    worker.stop()
    assert worker.handled == 2 and worker.dropped == 9


def test_while_the_queue_is_full_exchanges_are_dropped_and_counted(notes):
    worker = ExchangeWorker([notes], queue_size=2)
    worker.start()
    notes.wait.clear()
    for _ in range(10):
        worker.offer(EXCHANGE)
    notes.wait.set()
    worker.stop()
    looked_at = notes.calls.count(EXCHANGE)
    assert looked_at in (2, 3) and worker.dropped == 10 - looked_at
    (dropped,) = [family for family in worker.collect() if family.name == "loradock_tap_dropped"]
    assert dropped.samples[0].value == worker.dropped


def test_what_fails_on_one_request_goes_on_with_the_next_and_hinders_no_other(notes, caplog):
    other = Notes()
    notes.broken = True
    worker = ExchangeWorker([notes, other])
    worker.start()
    worker.offer(EXCHANGE)
    worker.offer(EXCHANGE)
    worker.stop()
    assert notes.calls.count(EXCHANGE) == other.calls.count(EXCHANGE) == 2
    assert "this request is odd" in caplog.text


def test_it_saves_also_when_no_traffic_comes(notes):
    worker = ExchangeWorker([notes], save_seconds=0.01)
    worker.start()
    assert notes.saved.wait(60)
    worker.stop()


async def test_a_full_queue_drops_and_counts_and_the_answer_goes_out(connect, watched, backend, make_adapter):
    Engine(backend)
    async with connect(watched) as client:
        parts = client._transport.app.state.parts
        await push(client, make_adapter, 0)
        with parts.drift_monitor._lock:  # the worker waits for it
            for _ in range(QUEUE_SIZE + 100):
                parts.exchange_worker.offer(Exchange("tone", "v1", 200, 0.1, 0.2, generations=(backend.generation,)))
            await ask(client, 1)
        assert parts.exchange_worker.dropped >= 90
        assert "loradock_tap_dropped_total" in (await client.get("/metrics")).text
