"""Nothing that was used is forgotten, and nothing counts twice: over writes, failures, restarts and several servers."""

from __future__ import annotations

import asyncio
import threading
from contextlib import contextmanager
from datetime import UTC, datetime

import pytest
from sqlalchemy import event

from serve.adapters.registry.registry import Registry
from serve.asgi.exchange import Generation
from serve.engine.payer import PROBES, Cause, Payer, Work
from serve.errors import EngineUnavailable
from serve.telemetry.prices import Price
from serve.telemetry.usage import usage_ledger
from serve.telemetry.usage.usage_ledger import Usage, UsageLedger
from tests.support.waiting import settled

NOVEMBER = datetime(2026, 11, 25, 12, tzinfo=UTC).timestamp()
DAY = 86_400.0


@pytest.fixture
def registry(url):
    with Registry(url) as registry:
        yield registry


def asked(ledger, count=1, *, tenant="acme", adapter="acme/tone", when=NOVEMBER, prices=(), cause=Cause.REQUEST):
    made = Generation([1] * 30, [2] * 10, "stop", cached=16, engine_seconds=0.25)
    work = Work(Payer(tenant, cause, None), adapter, when, (made,))
    for _ in range(count):
        ledger.take(work, Usage.of(work, prices))


def opened(registry, now=NOVEMBER, **more):
    return UsageLedger(registry, clock=lambda: now, **more)


def test_a_month_is_added_up_by_tenant_and_adapter(registry):
    ledger = opened(registry)
    prices = [Price(prompt=1.0, generated=10.0, cached=0.0)]
    asked(ledger, 2, prices=prices)
    asked(ledger, 1, when=NOVEMBER - DAY, prices=prices)
    asked(ledger, 1, tenant="globex", prices=prices)
    asked(ledger, 1, when=NOVEMBER - 30 * DAY)
    ledger.write()
    first, second = ledger.rows("2026-11")
    assert (first["tenant"], first["adapter"], first["requests"]) == ("acme", "acme/tone", 3)
    assert (first["prompt_tokens"], first["cached_tokens"], first["generated_tokens"]) == (90, 48, 30)
    assert first["engine_seconds"] == 0.75 and first["cost"] == pytest.approx(3 * (14 + 100) / 1e6)
    assert (second["tenant"], second["requests"]) == ("globex", 1)
    assert [row["requests"] for row in ledger.rows("2026-10")] == [1]
    assert [row["tenant"] for row in ledger.rows("2026-11", "globex")] == ["globex"]
    assert ledger.rows("2026-12") == []


def test_a_row_says_what_its_tokens_were_for(registry):
    ledger = opened(registry)
    asked(ledger, 2)
    asked(ledger, 1, cause=Cause.GUARD)
    ledger.write()
    asked(ledger, 1, cause=Cause.GUARD)
    ledger.write()
    (row,) = ledger.rows("2026-11")
    assert row["requests"] == 4 and {cause: part["requests"] for cause, part in row["causes"].items()} == {
        "request": 2,
        "guard": 2,
    }
    assert sum(part["prompt_tokens"] for part in row["causes"].values()) == row["prompt_tokens"]


def test_what_several_servers_write_adds_up_and_a_restart_forgets_nothing(registry, url):
    first, ledger = opened(registry), opened(registry)
    with Registry(url) as other_registry:
        other = opened(other_registry)
        threads = [threading.Thread(target=_ask_and_write, args=(each,)) for each in (first, ledger, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert opened(registry).rows("2026-11")[0]["requests"] == 3 * 20 * 5


def _ask_and_write(ledger):
    for _ in range(20):
        asked(ledger, 5)
        ledger.write()


def test_what_the_database_does_not_take_is_written_later_and_once(registry, monkeypatch):
    ledger = opened(registry)
    asked(ledger, 3)
    with monkeypatch.context() as patched:
        patched.setattr(registry, "adding", _refusing)
        with pytest.raises(EngineUnavailable):
            ledger.write()
        asked(ledger, 2)
        ledger.close()
    assert ledger.rows("2026-11") == []
    ledger.write()
    ledger.write()
    assert ledger.rows("2026-11")[0]["requests"] == 5


def test_sums_and_their_causes_are_of_one_moment(registry, monkeypatch):
    ledger = opened(registry)
    asked(ledger, 3)
    ledger.write()
    plain = usage_ledger._plain

    def others_write(row):
        monkeypatch.setattr(usage_ledger, "_plain", plain)
        asked(ledger, 2, tenant="globex")
        ledger.write()
        return plain(row)

    monkeypatch.setattr(usage_ledger, "_plain", others_write)
    assert [row["requests"] for row in ledger.rows("2026-11")] == [3]
    assert [row["requests"] for row in ledger.rows("2026-11")] == [3, 2]


async def test_an_outage_of_the_database_ends_no_writing(registry, monkeypatch):
    monkeypatch.setattr(usage_ledger, "WRITE_SECONDS", 0.02)
    ledger = opened(registry)
    asked(ledger, 3)
    with monkeypatch.context() as patched:
        refused = threading.Event()
        patched.setattr(registry, "adding", lambda: (refused.set(), _refusing()))
        writing = asyncio.create_task(ledger.run())
        assert await asyncio.to_thread(refused.wait, 60)
    try:
        assert await settled(lambda: ledger.rows("2026-11") or writing.done())
    finally:
        writing.cancel()
    assert ledger.rows("2026-11")[0]["requests"] == 3


def _refusing():
    raise EngineUnavailable("the registry did not take the change (locked); retry shortly")


def test_days_that_are_too_old_are_deleted(registry):
    ledger = opened(registry, keep_days=10)
    asked(ledger, when=NOVEMBER - 30 * DAY)
    asked(ledger)
    ledger.write()
    assert ledger.rows("2026-10") == [] and ledger.rows("2026-11")[0]["requests"] == 1


def test_a_prompt_of_several_answers_costs_once_and_only_its_first_answer_computes_it():
    prompt = [1] * 30
    made = tuple(Generation(prompt, [2] * 5, "stop", cached=cached, engine_seconds=0.5) for cached in (0, 16, 16))
    used = Usage.of(Work(PROBES, "tone", NOVEMBER, made), ())
    assert (used.prompt_tokens, used.cached_tokens, used.generated_tokens, used.engine_seconds) == (30, 0, 15, 1.5)


def test_what_was_taken_though_the_answer_was_lost_counts_once(registry, monkeypatch):
    monkeypatch.setattr(usage_ledger, "PIECE_ROWS", 2)
    ledger, adding, lost = opened(registry), registry.adding, [False, True]

    @contextmanager
    def losing(*tenant):
        with adding(*tenant) as connection:
            yield connection
        if lost and lost.pop(0):
            raise EngineUnavailable("the connection was cut after the commit")

    for number in range(5):
        asked(ledger, adapter=f"acme/{number}")
    monkeypatch.setattr(registry, "adding", losing)
    with pytest.raises(EngineUnavailable):
        ledger.write()
    asked(ledger, adapter="acme/2")
    ledger.write()
    ledger.write()
    assert {row["adapter"]: row["requests"] for row in ledger.rows("2026-11")} == {
        f"acme/{number}": 1 + (number == 2) for number in range(5)
    }


def test_many_adapters_are_a_few_statements_in_pieces(registry):
    ledger, statements = opened(registry), []
    for number in range(1200):
        asked(ledger, adapter=f"acme/{number}")
    event.listen(registry._engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
    ledger.write()
    # By piece: that it was taken, its rows, and what they were for.
    assert len([each for each in statements if each.startswith("INSERT")]) == 3 * 3
    assert sum(row["requests"] for row in ledger.rows("2026-11")) == 1200
