"""Drift and baselines, over a server whose engine is a fake that says what it generated."""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import random
import shutil
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from serve.asgi.exchange import Exchange, Generation
from serve.cli.baseline import prompts
from serve.drift.features.embedding import Embedding
from serve.drift.features.features import ALL_TOKENS, EARLIER_FEATURES, FEATURES, OUTPUT, PROMPT, WHOLE_PROMPTS
from serve.drift.monitor import DriftMonitor
from serve.drift.watched_version import DriftSettings, WatchedVersion
from serve.errors import ConfigError
from serve.events import DriftAlarm, Events
from tests.support.tiny import HIDDEN
from tests.support.waiting import settled
from tests.support.watched_traffic import CHAT, Engine, ask, drift, push

VOCABULARY = 32


async def test_the_first_requests_are_the_reference_and_steady_traffic_raises_nothing(
    connect, watched, backend, make_adapter
):
    Engine(backend)
    async with connect(watched) as client:
        await push(client, make_adapter, 0)
        await ask(client, 500)
        told = (await drift(client))["versions"][0]
        for kind in ("prompt", "output"):
            signal = told["signals"][kind]
            assert signal["phase"] == "watching" and signal["reference_requests"] == 100
            assert signal["samples"] > 200 and not signal["alarmed"]
        assert (await client.get("/v1/drift")).json()["data"][0]["versions"][0]["drifted"] == []


async def test_another_topic_moves_the_prompts_and_rolls_nothing_back(connect, watched, backend, make_adapter):
    engine = Engine(backend)
    async with connect(watched) as client:
        await push(client, make_adapter, 0, 1)
        await client.post("/v1/adapters/tone/promote", json={"version": 2})
        await ask(client, 270)
        engine.topic = range(14, 30)
        await ask(client, 150)
        told = await drift(client)
        signal = told["versions"][-1]["signals"]["prompt"]
        assert signal["alarmed"] and signal["since"] and signal["moved"]
        assert abs(signal["effects"]["rank_shift"]) > 0.1
        shown = (await client.get("/v1/adapters/tone")).json()
        assert shown["live"] == 2, "nothing follows of it but that it is told"
        (row,) = [row for row in shown["history"] if row["why"].startswith("prompt: ")]
        assert (row["who"], row["what"], row["from_version"]) == ("watcher", "drift", 2) and "rank_shift" in row["why"]
        lines = [json.loads(line) for line in (watched.data_dir / "audit.jsonl").read_text().splitlines()]
        assert ("watcher", "drift", "tone@v2", "prompt") in {
            (line["who"], line["what"], line["subject"], line.get("reason")) for line in lines
        }
        text = (await client.get("/metrics")).text
        assert 'loradock_drift_alarms_total{adapter="tone",signal="prompt",version="v2"} 1.0' in text
        again = await client.post("/v1/adapters/tone/drift/acknowledge", json={"version": 2})
        assert not again.json()["versions"][-1]["signals"]["prompt"]["alarmed"]


async def test_repeated_prompts_and_one_asker_again_and_again_are_left_out(connect, watched, backend, make_adapter):
    engine = Engine(backend)
    async with connect(watched) as client:
        await push(client, make_adapter, 0)
        await ask(client, 40)
        backend.generate = lambda body: Generation([1, 2, 3, *range(8, 20), 4, 5], [9], "stop")
        await ask(client, 30)
        backend.generate = engine.generate
        for _ in range(30):
            await client.post(CHAT, json={"model": "tone", "user": "the same"})
        counts = (await drift(client))["versions"][0]["thinning"]
        assert counts["repeated"] >= 29 and counts["same_conversation"] >= 20
        text = (await client.get("/metrics")).text
        for reason in ("repeated", "near_duplicate", "same_conversation", "warming_up"):
            series = f'loradock_drift_thinned_total{{adapter="tone",reason="{reason}",version="v1"}} {counts[reason]}.0'
            assert series in text


async def test_a_restart_keeps_the_reference_and_the_evidence(connect, watched, backend, make_adapter):
    engine = Engine(backend)
    async with connect(watched) as client:
        await push(client, make_adapter, 0)
        await ask(client, 300)
        before = (await drift(client))["versions"][0]["signals"]
    backend.held.clear()
    backend.numbers.clear()
    async with connect(watched) as client:
        await ask(client, 1)
        engine.topic = range(14, 30)
        after = (await drift(client))["versions"][0]["signals"]
        # One more request waits for those that follow it.
        assert after == before
        await ask(client, 200)
        assert (await drift(client))["versions"][0]["signals"]["prompt"]["alarmed"]


async def test_a_baseline_of_prompts_is_there_before_any_traffic(connect, watched, backend, make_adapter):
    engine = Engine(backend)
    async with connect(watched) as client:
        (id,) = await push(client, make_adapter, 0)
        prompts = [f"prompt {number}" for number in range(40)] + [[{"role": "user", "content": "hello"}]] * 20
        built = await client.post("/v1/adapters/tone/baseline", json={"prompts": prompts})
        assert built.json()["requests"] == {"prompt": 60, "output": 60, "logprob": 60}
        assert {body["model"] for body in backend.bodies} == {id} and len(backend.bodies) == 60
        told = (await drift(client))["versions"][0]
        assert told["baseline"] == "shipped" and told["signals"]["prompt"]["phase"] == "watching"
        lines = (await client.get("/metrics")).text.splitlines()
        asked = [line for line in lines if line.startswith("loradock_requests_total{")]
        assert all(line.endswith(" 0.0") for line in asked), "nobody's requests"
        engine.topic = range(14, 30)
        await ask(client, 220)
        assert (await drift(client))["versions"][0]["signals"]["prompt"]["alarmed"]
        few = await client.post("/v1/adapters/tone/baseline", json={"prompts": ["x"]})
        assert few.status_code == 400


async def test_a_baseline_is_shipped_from_one_server_to_another(connect, watched, backend, make_adapter, tmp_path):
    Engine(backend)
    async with connect(watched) as client:
        await push(client, make_adapter, 0)
        prompts = [f"prompt {number}" for number in range(60)]
        assert (await client.post("/v1/adapters/tone/baseline", json={"prompts": prompts})).status_code == 200
        saved = await client.get("/v1/adapters/tone/baseline")
        assert saved.status_code == 200 and len(saved.content) < 100_000
    elsewhere = replace(watched, data_dir=tmp_path / "elsewhere")
    async with connect(elsewhere, type(backend)(backend.model)) as client:
        await push(client, make_adapter, 0, 1)
        shipped = await client.put("/v1/adapters/tone/baseline", content=saved.content)
        assert shipped.json()["requests"] == {"prompt": 60, "output": 60, "logprob": 60}
        told = (await drift(client))["versions"][0]
        assert told["baseline"] == "shipped" and told["signals"]["output"]["phase"] == "watching"
        other = await client.put("/v1/adapters/tone/baseline?version=2", content=saved.content)
        assert other.status_code == 400 and "another version" in other.json()["error"]["message"]
        for wrong in (b"", b"PK", saved.content[:500]):
            assert (await client.put("/v1/adapters/tone/baseline", content=wrong)).status_code == 400


def test_a_file_of_prompts_is_read_line_by_line(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('"one"\n{"prompt": "two"}\n\n{"messages": [{"role": "user", "content": "three"}]}\n')
    assert prompts(file) == ["one", "two", [{"role": "user", "content": "three"}]]
    file.write_text('"one\u2028more"\r\n"two"')
    assert prompts(file) == ["one\u2028more", "two"], "a line ends where JSON lines end"
    for wrong in ("{", "3", '{"text": "x"}'):
        file.write_text('"one"\n' + wrong)
        with pytest.raises(ConfigError, match="line 2"):
            prompts(file)


async def test_over_another_base_model_a_version_begins_anew(connect, watched, backend, make_adapter, tmp_path):
    engine = Engine(backend)
    other = shutil.copytree(watched.model, tmp_path / "other")
    table = torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(1))
    save_file({"model.embed_tokens.weight": table}, other / "model.safetensors")

    async def gathered():
        versions = (await drift(client))["versions"]
        return versions[0]["signals"]["prompt"]["reference_requests"] if versions else 0

    async with connect(watched) as client:
        await push(client, make_adapter, 0)
        await ask(client, 270)
        assert await gathered() == 100
        backend.prepare = lambda heir: (setattr(heir, "generate", engine.generate), heir.effects.update(tone=3.0))
        refused = await client.post("/v1/engines/base/swap", json={"model": str(other)})
        assert refused.status_code == 409, refused.text
        await ask(client, 40)
        assert await gathered() == 100, "the one that serves is the one that is watched"
        backend.prepare = lambda heir: setattr(heir, "generate", engine.generate)
        assert (await client.post("/v1/engines/base/swap", json={"model": str(other)})).status_code == 200
        monitor = client._transport.app.state.parts.drift_monitor
        assert await settled(lambda: asyncio.sleep(0, monitor.watches("base")))
        await ask(client, 120)
        assert 0 < await gathered() < 100


async def test_a_version_that_is_removed_leaves_nothing_of_what_was_known(connect, watched, backend, make_adapter):
    Engine(backend)
    async with connect(watched) as client:
        await push(client, make_adapter, 0)
        await ask(client, 60)
        await drift(client)
        client._transport.app.state.parts.drift_monitor.save()
        assert list((watched.data_dir / "drift").glob("*/*/baseline.json"))
        assert (await client.delete("/v1/adapters/tone")).status_code == 200
        assert not list((watched.data_dir / "drift").glob("*/*"))


async def test_a_version_that_cannot_be_saved_keeps_no_other_from_it(
    connect, watched, backend, make_adapter, monkeypatch
):
    Engine(backend)
    async with connect(watched) as client:
        (id,) = await push(client, make_adapter, 0)
        await ask(client, 60)
        await ask(client, 60, "base")
        await drift(client)
        monitor = client._transport.app.state.parts.drift_monitor
        save = monitor._files.save

        def failing(baseline, saved):
            if saved == id:
                raise ValueError("the arrays do not fit")
            save(baseline, saved)

        monkeypatch.setattr(monitor._files, "save", failing)
        monitor.save()
        (kept,) = (watched.data_dir / "drift").glob("*/*/baseline.json")
        assert id.partition("@")[2] not in str(kept)


async def test_quotes_are_kept_only_when_asked_for_and_redacted(connect, watched, backend, make_adapter):
    text = "call 555-1234 now"
    for capture in (False, True):
        engine = Engine(backend)
        backend.generate = lambda body, made=engine.generate: replace(made(body), text=text)
        backend.held.clear()
        backend.numbers.clear()
        async with connect(
            replace(
                watched, capture=capture, capture_redact=(r"\d{3}-\d{4}",), data_dir=watched.data_dir / str(capture)
            )
        ) as client:
            await push(client, make_adapter, 0)
            await ask(client, 120)
            told = (await drift(client))["versions"][0]
            assert "555-1234" not in json.dumps(told)
            assert ("examples" in told) == capture
            if capture:
                assert told["examples"][0]["answer"] == "call [redacted] now"


async def test_the_probe_sees_weights_that_changed_without_any_traffic(connect, watched, backend, make_adapter):
    Engine(backend)
    async with connect(watched) as client:
        prober = client._transport.app.state.parts.prober
        await push(client, make_adapter, 0)
        await prober.round()
        backend.effects["tone"] = 0.9
        prober._interval = 1e-9
        await prober.round()
        told = (await drift(client))["versions"][0]["probe"]
        assert told["noise_ratio"] == pytest.approx(0.4 / 0.04)
        text = (await client.get("/metrics")).text
        assert 'loradock_drift_alarms_total{adapter="tone",signal="probe",version="v1"} 1.0' in text
        assert (await client.get("/v1/adapters/tone")).json()["history"][-1]["what"] == "drift"


WORDS = np.random.default_rng(2)
WIDE = Embedding.project(WORDS.standard_normal((5000, 16)))


def version_of(monitor):
    """The report of the one version that it watches, and what is known of it."""
    (watched,) = monitor._versions.values()
    return monitor.report("tone")[0], watched


def sent(monitor, count, *, system=(), topic=(0, 4000), asker=None, number=itertools.count()):
    """Prompts of one topic behind a system prompt, through the monitor."""
    for _ in range(count):
        prompt = [*system, *WORDS.integers(*topic, WORDS.integers(8, 30)).tolist()]
        generation = Generation(prompt, [1, 2], "stop")
        began = float(next(number))
        known = {"id": "tone@1", "asker": asker, "began": began}
        monitor.observe(Exchange("tone", "v1", 200, 0.1, 0.2, generations=(generation,), **known))
        monitor.looked()


def heard_by(alarms):
    events = Events()
    events.at_once("test", alarms.append, DriftAlarm)
    return events


def monitored(folder, alarms):
    monitor = DriftMonitor(folder, DriftSettings(reference=300), events=heard_by(alarms))
    monitor.learn("", WIDE)
    return monitor


def test_a_new_system_prompt_is_said_as_what_it_is_and_moves_no_prompts(tmp_path):
    alarms = []
    monitor = monitored(tmp_path, alarms)
    first, second = (WORDS.integers(0, 5000, length).tolist() for length in (454, 555))
    sent(monitor, 600, system=first)
    sent(monitor, 60, system=second)
    assert [alarm.signal for alarm in alarms] == ["opening"]
    assert alarms[0].effects["share"] < 0.5 < 0.9 < alarms[0].effects["share_before"]
    sent(monitor, 2000, system=second)
    report, watched = version_of(monitor)
    assert [alarm.signal for alarm in alarms] == ["opening"], "once"
    assert report["opening"]["alarmed"] and report["opening"]["since"] and not report["signals"]["prompt"]["alarmed"]
    assert report["signals"]["prompt"]["samples"] > 2000
    monitor.acknowledge("tone", "v1", "tone@1")
    sent(monitor, 500, system=second)
    report, watched = version_of(monitor)
    assert not report["opening"]["alarmed"] and report["opening"]["share"] == 1 and watched.alarmed == {}


def test_a_new_system_prompt_hides_no_other_language(tmp_path):
    alarms = []
    monitor = monitored(tmp_path, alarms)
    first, second = (WORDS.integers(0, 5000, length).tolist() for length in (454, 555))
    sent(monitor, 600, system=first)
    sent(monitor, 60, system=second, topic=(4000, 4030))
    assert {alarm.signal for alarm in alarms} == {"opening", "prompt"}


def test_traffic_that_is_all_left_out_is_an_alarm_and_not_silence(tmp_path):
    alarms = []
    monitor = monitored(tmp_path, alarms)
    sent(monitor, 1200)
    sent(monitor, 600, topic=(7, 8))
    assert [alarm.signal for alarm in alarms] == ["sampling"]
    assert "most requests repeat earlier prompts: " in alarms[0].moved["text"]
    report, _ = version_of(monitor)
    assert (
        report["sampling"]["share"] < 0.4
        and report["thinning"]["near_duplicate"] + report["thinning"]["repeated"] > 500
    )


def test_where_one_asker_sends_nearly_all_the_alarm_says_so(tmp_path):
    alarms = []
    monitor = monitored(tmp_path, alarms)
    sent(monitor, 1200)
    sent(monitor, 600, asker=b"an application")
    assert [alarm.signal for alarm in alarms] == ["sampling"]
    assert "most requests come from askers who asked a moment ago: " in alarms[0].moved["text"]


def test_what_thinning_remembers_outlives_a_restart_and_goes_to_the_next_version(tmp_path):
    alarms = []
    monitor = monitored(tmp_path, alarms)
    first, second = (WORDS.integers(0, 5000, length).tolist() for length in (454, 555))
    sent(monitor, 600, system=first)
    sent(monitor, 60, system=second)
    before, _ = version_of(monitor)
    monitor.stop()
    again = monitored(tmp_path, alarms)
    sent(again, 9, system=second)
    report, watched = version_of(again)
    assert report["opening"]["alarmed"] and report["opening"]["since"] == before["opening"]["since"]
    assert sum(report["thinning"].values()) == sum(before["thinning"].values()) + 1
    assert len(alarms) == 1, "an alarm is not raised twice"
    heir = watched.baseline.successor(replace(watched.baseline.provenance, version="2"))
    remembered = WatchedVersion("tone", "v2", "tone@2", "", heir, watched.settings)
    assert remembered.alarmed == {} and sum(remembered.thinning.counts.values()) == 0
    assert len(remembered.thinning._prompts) == len(watched.thinning._prompts) > 60


def test_requests_that_are_compared_together_say_what_they_say_one_by_one(tmp_path):
    told = []
    for together in (1, 7, 100):
        alarms = []
        monitor = DriftMonitor(tmp_path / str(together), DriftSettings(reference=300), events=heard_by(alarms))
        monitor.learn("", WIDE)
        draw = np.random.default_rng(5)
        for number in range(900):
            topic = (0, 4000) if number < 700 else (3000, 5000)
            prompt, answer = (draw.integers(*topic, draw.integers(8, 30)).tolist() for _ in range(2))
            logprobs = (-draw.random(len(answer))).tolist() if number % 3 == 0 else None
            generation = Generation(prompt, answer, "stop", logprobs=logprobs)
            known = {"id": "tone@1", "asker": f"user {number}".encode(), "began": float(number)}
            monitor.observe(Exchange("tone", "v1", 200, 0.1, 0.2, generations=(generation,), **known))
            if (number + 1) % together == 0:
                monitor.looked()
        monitor.looked()
        (version,) = monitor._versions.values()
        states = {kind: signal.state() for kind, signal in version.baseline.signals.items()}
        raised = [(alarm.signal, alarm.log_evidence, alarm.moved) for alarm in alarms]
        told.append((raised, monitor.report("tone"), monitor.false_alarms(), states))
    assert {signal for signal, *_ in told[0][0]} >= {PROMPT, OUTPUT}
    for raised, report, false_alarms, states in told[1:]:
        assert (raised, false_alarms) == (told[0][0], told[0][2])
        np.testing.assert_equal(states, told[0][3])
        np.testing.assert_equal(report, told[0][1])


class Prompt(list):
    """Tokens that can be looked for once everybody should have let go of them."""


def test_of_what_was_asked_numbers_are_kept_and_neither_tokens_nor_text(tmp_path):
    monitor = DriftMonitor(tmp_path, DriftSettings(reference=100))
    monitor.learn("", Embedding.project(np.random.default_rng(0).standard_normal((VOCABULARY, HIDDEN))))
    draw, prompts = random.Random(0), []
    for number in range(200):
        prompt = Prompt([1, 2, 3, *draw.choices(range(8, 20), k=draw.randint(8, 20)), 4, 5])
        prompts.append(weakref.ref(prompt))
        generation = Generation(prompt, draw.choices(range(8, 32), k=10), "stop", "a text")
        asker = f"user {number}".encode()
        monitor.observe(
            Exchange("tone", "v1", 200, 0.1, 0.2, id="tone@1", asker=asker, began=number, generations=(generation,))
        )
    monitor.looked()
    del prompt, generation
    gc.collect()
    assert not [prompt for prompt in prompts if prompt() is not None]
    (version,) = monitor._versions.values()
    assert version.thinning.counts["accepted"] > 60
    assert {len(digest) for digest in (*version.thinning._prompts._last, *version.thinning._bands._last)} == {16}


@pytest.mark.parametrize("features", [number for number in EARLIER_FEATURES if number <= WHOLE_PROMPTS])
def test_a_baseline_of_an_earlier_release_goes_on_and_the_next_version_has_its_own(tmp_path, features):
    monitor = monitored(tmp_path, alarms := [])
    system = WORDS.integers(0, 5000, 200).tolist()
    sent(monitor, 1, system=system)
    _, watched = version_of(monitor)
    watched.baseline.provenance = replace(watched.baseline.provenance, features=features)
    watched.replace_baseline(watched.baseline)
    sent(monitor, 600, system=system)
    of_all_tokens = np.exp(watched.baseline.signals["prompt"]._scale.centre[0]) > 200
    assert of_all_tokens == (features == ALL_TOKENS)
    before, _ = version_of(monitor)
    monitor.stop()
    again = monitored(tmp_path, alarms)
    sent(again, 8, system=system)
    report, watched = version_of(again)
    for each in (report, before):
        each["signals"]["prompt"]["structure"].pop("mean_rows", None)
    assert (
        report["signals"]["prompt"] == before["signals"]["prompt"] and watched.baseline.provenance.features == features
    )
    sent(again, 500, system=system)
    assert alarms == []
    generation = Generation([1, 2, 3], [1, 2], "stop")
    again.observe(Exchange("tone", "v2", 200, 0.1, 0.2, id="tone@2", generations=(generation,)))
    again.looked()
    assert again._versions["tone@2"].baseline.provenance.features == FEATURES
    assert again._versions["tone@2"].baseline.signals["prompt"].gathered == 0
