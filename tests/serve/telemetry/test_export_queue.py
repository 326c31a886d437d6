from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from serve.telemetry.export_queue import ExportQueue
from tests.support.waiting import eventually


class Receiver:
    """Takes batches, unless `refuses` says otherwise."""

    def __init__(self) -> None:
        self.taken: list[list[int]] = []
        self.attempts = 0
        self.refuses: Callable[[Sequence[int]], bool] = lambda items: False
        self.closed = threading.Event()

    def export(self, items: Sequence[int]) -> bool:
        self.attempts += 1
        if self.refuses(items):
            return False
        self.taken.append(list(items))
        return True

    @property
    def items(self) -> list[int]:
        return [item for batch in self.taken for item in batch]


def queue(receiver: Receiver, **more) -> ExportQueue[int]:
    settings = {"size": 100, "batch": 10, "delay": 0.01, "pause": 0.01, **more}
    return ExportQueue("numbers", receiver.export, receiver.closed.set, **settings)


def test_what_waits_goes_in_batches_and_in_order():
    receiver = Receiver()
    numbers = queue(receiver)
    for number in range(25):
        numbers.put(number)
    numbers.start()
    assert eventually(lambda: receiver.items == list(range(25)))
    assert max(map(len, receiver.taken)) <= 10
    numbers.stop()
    assert (numbers.delivered, numbers.dropped) == (25, 0) and receiver.closed.is_set()


def test_a_receiver_that_was_gone_gets_everything_in_order_when_it_is_back():
    receiver = Receiver()
    gone = True
    receiver.refuses = lambda items: gone
    numbers = queue(receiver)
    numbers.start()
    for number in range(60):
        numbers.put(number)
    assert eventually(lambda: receiver.attempts >= 3)
    gone = False
    assert eventually(lambda: sorted(receiver.items) == list(range(60)))
    numbers.stop()
    assert numbers.dropped == 0


def test_when_more_wait_than_may_the_oldest_are_dropped_and_counted():
    receiver = Receiver()
    numbers = queue(receiver, size=20, weigh=lambda number: 2)
    for number in range(15):
        numbers.put(number)
    assert (numbers.waiting, numbers.dropped) == (10, 5)
    numbers.start()
    assert eventually(lambda: receiver.items == list(range(5, 15)))
    numbers.stop()


def test_a_batch_that_is_too_large_for_the_receiver_goes_in_parts():
    receiver = Receiver()
    receiver.refuses = lambda items: len(items) > 3
    numbers = queue(receiver)
    for number in range(20):
        numbers.put(number)
    numbers.start()
    assert eventually(lambda: receiver.items == list(range(20)))
    numbers.stop()
    assert numbers.dropped == 0


def test_one_that_is_never_taken_keeps_no_others_back_and_is_dropped_and_counted():
    receiver = Receiver()
    receiver.refuses = lambda items: 7 in items
    numbers = queue(receiver)
    for number in range(20):
        numbers.put(number)
    numbers.start()
    others = [number for number in range(20) if number != 7]
    assert eventually(lambda: sorted(receiver.items) == others and numbers.dropped == 1)
    numbers.stop()


def test_an_export_that_raises_loses_nothing():
    receiver = Receiver()
    broken = True

    def refuses(items):
        if broken:
            raise RuntimeError("broken")
        return False

    receiver.refuses = refuses
    numbers = queue(receiver)
    numbers.start()
    numbers.put(1)
    assert eventually(lambda: receiver.attempts >= 2)
    broken = False
    assert eventually(lambda: receiver.items == [1])
    numbers.stop()


def test_a_stop_delivers_what_waits():
    receiver = Receiver()
    numbers = queue(receiver, delay=60)
    numbers.start()
    for number in range(5):
        numbers.put(number)
    numbers.stop()
    assert receiver.items == list(range(5)) and numbers.dropped == 0


def test_a_stop_ends_the_wait_for_a_receiver_that_hangs_and_counts_what_is_lost():
    receiver = Receiver()
    receiver.refuses = lambda items: receiver.closed.wait(60)
    numbers = queue(receiver)
    numbers.start()
    numbers.put(1)
    numbers.put(2)
    assert eventually(lambda: receiver.attempts == 1)
    numbers.put(3)
    numbers.stop(0.1)
    assert eventually(lambda: numbers.dropped == 3)
