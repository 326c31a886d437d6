"""The bus: whoever publishes waits for nobody, and no subscriber suffers from another."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import textwrap
import threading
from pathlib import Path

import pytest

from serve import events as module
from serve.events import DriftAlarm, Events, Notice, Promoted, RolledBack
from tests.support.app import upload

ALARM = DriftAlarm("acme/tone", "v2", "prompt", {"rank_shift": 0.30004}, float("inf"), {"text": "German"})


@pytest.fixture
def bus():
    bus = Events()
    yield bus
    bus.stop()


def promoted(count):
    return [Promoted("tone", number, "anna") for number in range(count)]


def failures(bus, name):
    (family,) = bus.collect()
    return {sample.labels["result"]: sample.value for sample in family.samples if sample.labels["subscriber"] == name}


def test_a_subscriber_gets_its_kinds_in_their_order_also_what_came_before_the_start(bus):
    took, noticed = [], []
    bus.subscribe("one", took.append, Promoted)
    bus.subscribe("two", noticed.append, Notice, RolledBack)
    rollback = RolledBack("tone", 1, "anna")
    for event in (*promoted(50), ALARM, rollback):
        bus.publish(event)
    assert not took and not noticed, "nobody has a thread yet"
    bus.start()
    bus.publish(Promoted("tone", 50, "anna"))
    bus.settle()
    assert took == promoted(51) and noticed == [ALARM, rollback]


def test_whoever_subscribes_after_the_start_is_told_too(bus):
    took = []
    bus.start()
    bus.subscribe("late", took.append, Promoted)
    bus.publish(promoted(1)[0])
    bus.settle()
    assert took == promoted(1)


@pytest.mark.parametrize("how", ["subscribe", "at_once"])
def test_one_that_fails_is_logged_and_counted_and_the_others_are_told(bus, caplog, how):
    took, tries = [], []

    def fails(event):
        tries.append(event)
        if event.version == 0:
            raise RuntimeError("no")

    getattr(bus, how)("broken", fails, Promoted)
    bus.subscribe("other", took.append, Promoted)
    bus.start()
    with caplog.at_level(logging.ERROR):
        for event in promoted(2):
            bus.publish(event)
        bus.settle()
    assert tries == took == promoted(2), "it gets the next one all the same"
    assert failures(bus, "broken") == {"failed": 1, "dropped": 0} and failures(bus, "other")["failed"] == 0
    assert "broken failed over Promoted" in caplog.text and "RuntimeError: no" in caplog.text


def test_one_that_is_slow_holds_up_nobody_and_loses_what_is_too_much_for_it_alone(bus, monkeypatch, caplog):
    monkeypatch.setattr(module, "QUEUE", 3)
    go_on, entered, took, quick = threading.Event(), threading.Event(), [], []

    def slow(event):
        entered.set()
        go_on.wait()
        took.append(event)

    bus.subscribe("slow", slow, Promoted)
    bus.at_once("quick", quick.append, Promoted)
    bus.start()
    first, *rest = promoted(6)
    bus.publish(first)
    entered.wait()
    for event in rest:
        bus.publish(event)
    assert quick == promoted(6)
    assert failures(bus, "slow") == {"failed": 0, "dropped": 2}
    assert caplog.text.count("slow is too slow") == 1, "said once"
    go_on.set()
    bus.settle()
    assert took == promoted(4), "in order, without those that had no room"


def test_what_waits_is_taken_before_the_end_but_not_for_ever(monkeypatch):
    bus, took = Events(), []
    bus.subscribe("one", took.append, Promoted)
    bus.start()
    for event in promoted(100):
        bus.publish(event)
    bus.stop()
    assert took == promoted(100)
    monkeypatch.setattr(module, "STOP_SECONDS", 0.05)
    hangs, never = Events(), threading.Event()
    hangs.subscribe("hangs", lambda event: never.wait(), Promoted)
    hangs.start()
    hangs.publish(promoted(1)[0])
    hangs.stop()  # returns
    never.set()


def test_an_alarm_says_the_same_to_webhooks_and_to_the_audit_log():
    data, line = ALARM.data(), ALARM.audit_line()
    assert (ALARM.kind, data["tenant"], data["effects"]) == ("drift.alarm", "acme", {"rank_shift": 0.3})
    assert data["log_evidence"] is None, "JSON knows no infinity"
    assert (line["who"], line["subject"], line["reason"]) == ("watcher", "acme/tone@v2", "prompt")
    assert json.loads(line["evidence"]) == {"signal": "prompt", "rank_shift": 0.3, "text": "German"}


async def test_a_server_tells_of_each_change_of_what_is_live_whichever_door_it_came_through(client, make_adapter):
    bus, told = client._transport.app.state.parts.events, []
    bus.at_once("toy", lambda event: told.append((type(event).__name__, event.version)), module.Event)
    await client.post("/v1/adapters", **upload(make_adapter(0)))
    await client.post("/v1/adapters", **upload(make_adapter(1), promote="false"))
    await client.post("/v1/adapters/tone/promote", json={"version": 2})
    await client.post("/v1/adapters/tone/rollback", json={})
    await client.post("/v1/unload_lora_adapter", json={"lora_name": "tone"})
    assert told == [
        ("VersionAdded", 1), ("Promoted", 1), ("VersionAdded", 2), ("Promoted", 2), ("RolledBack", 1), ("Unloaded", 1)
    ]  # fmt: skip
    swaps = [line for line in (await client.get("/metrics")).text.splitlines() if "adapter_swaps_total{" in line]
    assert 'loradock_adapter_swaps_total{adapter="tone",result="promoted"} 2.0' in swaps
    assert 'loradock_adapter_swaps_total{adapter="tone",result="rolled_back"} 1.0' in swaps


async def test_a_toy_subscriber_is_a_file_and_a_line_as_the_docs_say(client, capsys):
    """Run as it stands in docs/contributing.md."""
    page = (Path(__file__).parents[2] / "docs" / "contributing.md").read_text()
    section = page.partition("### a subscriber to events")[2].partition("###")[0]
    (file,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (line,) = re.findall(r"`(events\.subscribe\(.*?\))`", section)
    names = {"events": client._transport.app.state.parts.events}
    exec(f"{textwrap.dedent(file)}\n{line}", names)
    names["events"].publish(ALARM)
    await asyncio.to_thread(names["events"].settle)
    assert "acme/tone@v2: German" in capsys.readouterr().out
