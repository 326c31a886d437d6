"""Every second that the engine works is somebody's."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest

from serve.vllm_backend.step_times import StepTimes


def sequence(scheduled, watched=True):
    """vLLM's state of a sequence, as far as it is read."""
    charged = SimpleNamespace(engine_seconds=0.0) if watched else None
    return SimpleNamespace(watched=charged, stats=SimpleNamespace(scheduled_ts=scheduled))


def test_a_step_is_divided_by_the_tokens_computed():
    times, begins, goes_on = StepTimes(), sequence(10.0), sequence(10.0)
    times.computed([(begins, 30), (goes_on, 10)], 14.0)
    times.ended()
    assert (times.busy, begins.watched.engine_seconds, goes_on.watched.engine_seconds) == (4.0, 3.0, 1.0)


def test_a_step_begins_when_the_one_before_it_ended_and_an_idle_engine_is_not_busy():
    times, first = StepTimes(), sequence(10.0)
    times.computed([(first, 5)], 11.0)
    times.ended()
    times.computed([(first, 1)], 11.5)
    times.ended()
    assert times.busy == 1.5
    times.computed([(sequence(20.0), 5)], 20.25)
    times.ended()
    assert times.busy == 1.75


def test_a_step_that_is_shown_in_slices_is_one_and_one_that_computed_nothing_is_none():
    times, first, second = StepTimes(), sequence(1.0), sequence(1.5)
    times.computed([(first, 1)], 2.0)
    times.computed([(second, 3)], 2.0)
    times.ended()
    times.ended()
    assert (first.watched.engine_seconds, second.watched.engine_seconds, times.busy) == (0.25, 0.75, 1.0)


def test_the_servers_own_requests_are_charged_to_nobody():
    times, client = StepTimes(), sequence(0.0)
    times.computed([(client, 1), (sequence(0.0, watched=False), 3)], 2.0)
    times.ended()
    assert (client.watched.engine_seconds, times.background) == (0.5, 1.5)


def test_the_engines_of_several_ranks_each_have_a_clock():
    times, here, there = StepTimes(), sequence(1.0), sequence(1.0)
    for until in (2.0, 3.0):
        times.computed([(here, 1)], until)
        times.ended(0)
        times.computed([(there, 1)], until)
        times.ended(1)
    assert times.busy == 4.0 and here.watched.engine_seconds == 2.0


def test_the_parts_add_up_to_the_busy_time():
    times, lots, now = StepTimes(), random.Random(3), 0.0
    running: list = []
    everybody: list = []
    for _ in range(2000):
        now += lots.random() * (1.0 if running else 3.0)
        while len(running) < lots.randint(1, 8):
            running.append(sequence(now, watched=lots.random() < 0.9))
            everybody.append(running[-1])
        now += lots.random()
        times.computed([(state, lots.choice((1, 1, 1, 200))) for state in running], now)
        times.ended()
        running = [state for state in running if lots.random() < 0.9]
    charged = sum(state.watched.engine_seconds for state in everybody if state.watched)
    assert charged + times.background == pytest.approx(times.busy)
