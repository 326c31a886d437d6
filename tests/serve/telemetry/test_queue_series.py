"""The server's own queue by adapter and tenant: bounded, and those who wait are named."""

from __future__ import annotations

import time

import pytest

from serve.engine.engine import LOW_PRIORITY
from serve.engine.fair_queue import FairQueue
from serve.engine.fleet import Fleet
from serve.engine.restarts import Patience
from serve.engine.supervisor import Supervisor
from serve.telemetry.queue_series import QueueSeries
from tests.support.backend import FakeBackend

WAITING, OLDEST, REFUSED = "waiting", "oldest_seconds", "refused_total"


@pytest.fixture
def fleet() -> Fleet:
    fleet = Fleet([Supervisor(FakeBackend("."), None, Patience())])
    fleet.first.engine.queue = FairQueue(1, 100)
    fleet.first.engine.queue.enter("first", None)  # has the seat
    return fleet


@pytest.fixture
def queue(fleet) -> FairQueue:
    return fleet.first.engine.queue


def shown(series: QueueSeries, what: str) -> dict[tuple[str, str], float]:
    samples = [sample for family in series.collect() for sample in family.samples]
    return {
        (sample.labels["adapter"], sample.labels["tenant"]): sample.value
        for sample in samples
        if sample.name == f"loradock_queue_{what}"
    }


def test_who_waits_is_shown_by_adapter_and_tenant(fleet, queue):
    series = QueueSeries(fleet, 10)
    tickets = [queue.enter("acme", "acme/tone@0123456789ab") for _ in range(3)]
    queue.enter("acme", "acme/tone@ba9876543210")
    queue.enter("zeta", None)
    tickets[0].entered = time.monotonic() - 20
    series.tidy({"acme/tone", "base"})
    assert shown(series, WAITING) == {("acme/tone", "acme"): 4, ("base", "zeta"): 1, ("other", "other"): 0}
    oldest = shown(series, OLDEST)
    assert 20 <= oldest["acme/tone", "acme"] < 40 and oldest["base", "zeta"] < 20


def test_a_pair_that_was_asked_is_there_at_0_and_stays_when_the_queue_is_gone(fleet, queue):
    series = QueueSeries(fleet, 10)
    series.take("tone", "acme", refused=False)
    pair = ("tone", "acme")
    assert shown(series, WAITING)[pair] == shown(series, OLDEST)[pair] == shown(series, REFUSED)[pair] == 0
    ticket = queue.enter("acme", "tone@0123456789ab")
    series.tidy({"tone", "base"})
    assert shown(series, WAITING)[pair] == 1
    queue.leave(ticket)
    series.tidy({"tone", "base"})
    assert shown(series, WAITING)[pair] == 0


def test_what_no_client_waits_for_is_left_out(fleet, queue):
    series = QueueSeries(fleet, 10)
    queue.enter("acme", None, priority=LOW_PRIORITY)
    queue.enter("", None)  # a probe of the server's own
    series.tidy({"base"})
    assert shown(series, WAITING) == {("other", "other"): 0}


def test_refusals_are_counted_by_adapter_and_tenant(fleet):
    series = QueueSeries(fleet, 1)
    for _ in range(3):
        series.take("tone", "acme", refused=True)
    series.take("calm", "zeta", refused=True)
    assert shown(series, REFUSED) == {("tone", "acme"): 3, ("other", "other"): 1}


def test_however_many_pairs_there_are_few_have_series_and_none_that_waits_is_lost(fleet, queue):
    series = QueueSeries(fleet, 5)
    for number in range(1000):
        series.take(f"adapter-{number}", "acme", refused=False)
        queue.enter(f"tenant-{number}", None)
    series.tidy({"base", *(f"adapter-{number}" for number in range(1000))})
    waiting = shown(series, WAITING)
    assert len(waiting) == 6 and sum(waiting.values()) == 1000


def test_who_waits_most_takes_the_place_of_who_waits_least_and_small_differences_change_nothing(fleet, queue):
    series = QueueSeries(fleet, 2)
    adapters = {"base", "quiet"}
    series.take("quiet", "acme", refused=False)
    for tenant, count in (("some", 4), ("more", 7)):
        for _ in range(count):
            queue.enter(tenant, None)
        series.tidy(adapters)
    assert shown(series, WAITING) == {("base", "some"): 4, ("base", "more"): 7, ("other", "other"): 0}
    for _ in range(8):
        queue.enter("as-much", None)
    series.tidy(adapters)
    assert ("base", "as-much") not in shown(series, WAITING)
    queue.enter("as-much", None)
    series.tidy(adapters)
    assert shown(series, WAITING) == {("base", "more"): 7, ("base", "as-much"): 9, ("other", "other"): 4}


def test_a_pair_of_an_adapter_that_was_deleted_is_gone(fleet):
    series = QueueSeries(fleet, 5)
    series.take("tone", "acme", refused=True)
    series.tidy({"base"})
    assert ("tone", "acme") not in shown(series, REFUSED)
