"""An alarm stays open until somebody deals with it, over restarts, unloading and new versions; then it is closed."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from serve.asgi.exchange import Exchange, Generation
from serve.drift.features.embedding import Embedding
from serve.drift.monitor import DriftMonitor
from serve.drift.watched_version import DriftSettings
from serve.models.request_text import RequestText
from tests.support.app import issued, upload
from tests.support.tiny import HIDDEN
from tests.support.watched_traffic import CHAT, Engine, ask, askers, drift, push

# What the fake engine's tokens mean: 8 to 19 are English, 20 to 31 German.
ENGLISH = ["the", "of", "and", "is", "what", "how", "invoice", "payment", "refund", "account", "order", "shipping"]
GERMAN = ["der", "die", "und", "ist", "nicht", "ein", "rezept", "zutaten", "backofen", "mehl", "zucker", "butter"]
WORDS = ["[UNK]", *(f"t{number}" for number in range(1, 8)), *ENGLISH, *GERMAN]
BEFORE, NOW = range(8, 20), range(20, 32)


def tokenizer_in(folder):
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.save(str(folder / "tokenizer.json"))


@pytest.fixture
def spoken(watched, tmp_path):
    """`watched`, over a model whose tokens are words."""
    tokenizer_in(tmp_path / "model")
    return watched


def restarted(backend):
    backend.held.clear()
    backend.numbers.clear()


async def alarmed(client, make_adapter, backend):
    """A version whose prompts have become German."""
    engine = Engine(backend)
    engine.topic = BEFORE
    await push(client, make_adapter, 0)
    await ask(client, 250)
    engine.topic = NOW
    await ask(client, 150)
    signal = (await drift(client))["versions"][0]["signals"]["prompt"]
    assert signal["alarmed"]
    return engine


def series(text, name, **labels):
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    lines = [line for line in text.splitlines() if line.startswith(name + "{") and all(each in line for each in wanted)]
    return [float(line.rpartition(" ")[2]) for line in lines]


async def test_an_alarm_says_in_words_what_moved(connect, spoken, backend, make_adapter):
    async with connect(spoken) as client:
        await alarmed(client, make_adapter, backend)
        moved = (await drift(client))["versions"][0]["alarms"]["prompt"]
        assert moved["language"]["before"] == {"en": 1.0} and moved["language"]["now"]["de"] > 0.8
        assert moved["share_at_least"] > 0.5 and moved["since"]
        assert moved["tenants"]["now"] == {"default": 1.0}
        words = set(moved["topics"][0]["words"])
        assert len(words) >= 2 and words <= {"rezept", "zutaten", "backofen", "mehl", "zucker", "butter"}
        assert "probably German (0 % before, " in moved["text"] and moved["text"].startswith(f"since {moved['since']}")
        (row,) = (await client.get("/v1/drift")).json()["data"][0]["versions"]
        assert "probably German" in row["moved"]["prompt"]
        history = (await client.get("/v1/adapters/tone")).json()["history"]
        assert any("probably German" in entry["why"] for entry in history if entry["what"] == "drift")
        audit = (spoken.data_dir / "audit.jsonl").read_text()
        assert "probably German" in audit


async def test_an_open_alarm_survives_a_restart_without_any_request(connect, spoken, backend, make_adapter):
    async with connect(spoken) as client:
        await alarmed(client, make_adapter, backend)
        before = (await drift(client))["versions"][0]
        metrics = (await client.get("/metrics")).text
    restarted(backend)
    async with connect(spoken) as client:
        (version,) = (await drift(client))["versions"]
        assert version["in_memory"] is False and version["version"] == "v1"
        assert version["signals"]["prompt"] == before["signals"]["prompt"]
        assert version["alarms"] == before["alarms"]
        (row,) = (await client.get("/v1/drift")).json()["data"][0]["versions"]
        assert "prompt" in row["drifted"] and "German" in row["moved"]["prompt"]
        again = (await client.get("/metrics")).text
        for name in ("loradock_drift_alarmed", "loradock_drift_alarms_total", "loradock_drift_samples_total"):
            assert series(again, name, signal="prompt") == series(metrics, name, signal="prompt"), name
        assert series(again, "loradock_drift_alarmed", signal="prompt") == [1.0]
        # It is closed without a request too.
        closed = await client.post("/v1/adapters/tone/drift/acknowledge", json={"version": 1})
        assert closed.status_code == 200 and closed.json()["versions"][0]["alarms"] == {}
        assert (await client.get("/v1/drift")).json()["data"][0]["versions"][0]["drifted"] == []
    restarted(backend)
    async with connect(spoken) as client:
        assert (await drift(client))["versions"] == []


async def test_the_operator_deals_with_the_alarms_of_a_base_which_has_no_versions(connect, spoken, backend):
    engine = Engine(backend)
    engine.topic = BEFORE
    async with connect(spoken) as client:
        await ask(client, 250, "base")
        engine.topic = NOW
        await ask(client, 150, "base")
        assert "prompt" in (await drift(client, "base"))["versions"][0]["alarms"]
        closed = await client.post("/v1/adapters/base/drift/acknowledge", json={})
        assert closed.status_code == 200 and closed.json()["versions"][0]["alarms"] == {}
        await ask(client, 100, "base")
        assert "prompt" in (await drift(client, "base"))["versions"][0]["alarms"], "the reference stayed"
        accepted = await client.post("/v1/adapters/base/drift/accept", json={"signals": "prompt", "note": "as planned"})
        assert accepted.status_code == 200 and "prompt" not in accepted.json()["versions"][0]["alarms"]
        refused = await client.post("/v1/adapters/base/drift/acknowledge", json={"version": 1})
        assert refused.status_code == 400 and "has no versions" in refused.json()["error"]["message"]
        lines = [json.loads(line) for line in (spoken.data_dir / "audit.jsonl").read_text().splitlines()]
        done = [line for line in lines if line["subject"] == "base" and line["status"] == 200]
        assert len(done) == 2 and done[1]["reason"] == "prompt: as planned"


async def test_without_a_number_the_live_versions_alarms_are_meant(connect, spoken, backend, make_adapter):
    async with connect(spoken) as client:
        await alarmed(client, make_adapter, backend)
        closed = await client.post("/v1/adapters/tone/drift/acknowledge", json={})
        assert closed.status_code == 200 and closed.json()["versions"][0]["alarms"] == {}


async def test_an_alarm_is_on_the_disk_before_the_next_minute(connect, spoken, backend, make_adapter):
    async with connect(spoken) as client:
        await alarmed(client, make_adapter, backend)
        (file,) = (spoken.data_dir / "drift").glob("*/*/alarms.json")
        assert json.loads(file.read_text())["alarmed"].keys() >= {"prompt"}


async def test_a_version_that_is_unloaded_keeps_its_open_alarm(connect, spoken, backend, make_adapter):
    async with connect(replace(spoken, drift_versions=1)) as client:
        await alarmed(client, make_adapter, backend)
        await client.post("/v1/adapters", **upload(make_adapter(5), name="other"))
        await ask(client, 40, "other")
        (version,) = (await drift(client))["versions"]
        assert version["in_memory"] is False and version["signals"]["prompt"]["alarmed"]
        assert series(
            (await client.get("/metrics")).text, "loradock_drift_alarmed", adapter="tone", signal="prompt"
        ) == [1.0]
        await ask(client, 1)
        (version,) = (await drift(client))["versions"]
        assert version["in_memory"] is True and "German" in version["alarms"]["prompt"]["text"]
        assert (await client.delete("/v1/adapters/tone")).status_code == 200
        client._transport.app.state.parts.metrics._rendered.clear()
        assert series((await client.get("/metrics")).text, "loradock_drift_alarmed", adapter="tone") == []


async def test_a_new_version_raises_alarms_of_its_own_alone(connect, spoken, backend, make_adapter):
    async with connect(spoken) as client:
        engine = await alarmed(client, make_adapter, backend)
        await client.post("/v1/adapters", **upload(make_adapter(1)))
        engine.topic = BEFORE
        await ask(client, 150)
        first, second = (await drift(client))["versions"]
        assert (first["version"], second["version"]) == ("v1", "v2")
        assert first["signals"]["prompt"]["alarmed"]
        signal = second["signals"]["prompt"]
        assert signal["phase"] == "watching" and not signal["alarmed"] and signal["alarms"] == 0
        text = (await client.get("/metrics")).text
        assert series(text, "loradock_drift_alarms_total", version="v2") == [0.0] * 6
        engine.topic = NOW
        await ask(client, 150)
        _, second = (await drift(client))["versions"]
        assert second["signals"]["prompt"]["alarms"] == 1 and "German" in second["alarms"]["prompt"]["text"]


async def test_series_are_there_from_the_first_request(connect, spoken, backend, make_adapter):
    Engine(backend)
    async with connect(spoken) as client:
        await push(client, make_adapter, 0)
        await ask(client, 1)
        await drift(client)
        text = (await client.get("/metrics")).text
        for name in ("evidence_log", "log_evidence", "alarms_total", "alarmed", "samples_total", "reference_requests"):
            expected = [] if name == "evidence_log" else [0.0]
            assert series(text, f"loradock_drift_{name}", adapter="tone", signal="output") == expected, name


async def test_an_accepted_change_is_the_reference_and_the_history_says_who_and_why(
    connect, spoken, backend, make_adapter
):
    async with connect(spoken) as client:
        await alarmed(client, make_adapter, backend)
        url = "/v1/adapters/tone/drift/accept"
        done = await client.post(url, json={"version": 1, "signals": "prompt", "note": "the German shop"})
        assert done.status_code == 200, done.text
        version = done.json()["versions"][0]
        assert "prompt" not in version["alarms"] and version["baseline"] == "accepted"
        signal = version["signals"]["prompt"]
        assert signal["alarms"] == 1 and not signal["alarmed"]
        await ask(client, 600)
        version = (await drift(client))["versions"][0]
        signal = version["signals"]["prompt"]
        assert signal["phase"] == "watching" and signal["alarms"] == 1 and not signal["alarmed"]
        entry = (await client.get("/v1/adapters/tone")).json()["history"][-1]
        assert (entry["what"], entry["from_version"], entry["why"]) == ("drift_accepted", 1, "prompt: the German shop")
        lines = [json.loads(line) for line in (spoken.data_dir / "audit.jsonl").read_text().splitlines()]
        (line,) = [line for line in lines if line["what"] == "accept"]
        assert (line["subject"], line["reason"], line["outcome"]) == ("tone@v1", "prompt: the German shop", "done")


async def test_what_cannot_be_accepted_is_said(client, make_adapter):
    url = "/v1/adapters/tone/drift/accept"
    assert (await client.post(url, json={"version": 1})).status_code == 404
    await push(client, make_adapter, 0)
    for body in ({}, {"version": 1, "signals": "all"}, {"version": 1, "note": "x" * 501}, {"version": 1, "else": 1}):
        assert (await client.post(url, json=body)).status_code == 400, body
    refused = await client.post(url, json={"version": 1})
    assert refused.status_code == 400 and "nothing is known" in refused.json()["error"]["message"]


async def test_a_tenant_sees_of_the_tenants_only_itself(connect, spoken, backend, make_adapter):
    from serve.config import keys_hashed

    engine = Engine(backend)
    engine.topic = BEFORE
    async with connect(replace(spoken, admin_keys=keys_hashed(["run"]))) as operator:
        operator.headers["authorization"] = "Bearer run"
        acme = await issued(operator, "acme")
        globex = await issued(operator, "globex")
        await acme.post("/v1/adapters", **upload(make_adapter(0), visibility="shared"))

        async def both(count):
            for _ in range(count):
                for client in (acme, globex):
                    answer = await client.post(CHAT, json={"model": "acme/tone", "user": f"u{next(askers)}"})
                    assert answer.status_code == 200, answer.text

        await both(130)
        engine.topic = NOW
        await both(80)
        await drift(operator, "acme/tone")
        seen = (await operator.get("/v1/adapters/acme/tone/drift")).json()["versions"][0]["alarms"]["prompt"]
        assert seen["tenants"]["now"].keys() == {"acme", "globex"}
        own = (await acme.get("/v1/adapters/tone/drift")).json()["versions"][0]["alarms"]["prompt"]
        assert own["tenants"]["now"].keys() == {"acme"} and "globex" not in json.dumps(own)
        await acme.aclose()
        await globex.aclose()


async def test_the_moved_requests_are_exported_where_text_is_kept(connect, spoken, backend, make_adapter):
    async with connect(spoken) as client:
        await push(client, make_adapter, 0)
        refused = await client.get("/v1/adapters/tone/drift/requests")
        assert refused.status_code == 409 and "capture" in refused.json()["error"]["message"]
    restarted(backend)
    kept = replace(spoken, capture=True, capture_redact=("zucker",), data_dir=spoken.data_dir / "kept")
    async with connect(kept) as client:
        await alarmed(client, make_adapter, backend)
        answer = await client.get("/v1/adapters/tone/drift/requests?version=1")
        assert answer.headers["content-type"].startswith("application/jsonl")
        rows = [json.loads(line) for line in answer.text.splitlines()]
        assert rows and rows == sorted(rows, key=lambda row: -row["moved"])
        german = [row for row in rows if "rezept" in row["prompt"] or "mehl" in row["prompt"]]
        assert len(german) > 0.8 * len(rows) and "zucker" not in answer.text and "[redacted]" in answer.text
        assert {"request_id", "when", "moved", "prompt", "answer"} == rows[0].keys()
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        table = await client.get("/v1/adapters/tone/drift/requests?format=parquet")
        assert parquet.read_table(pyarrow.BufferReader(table.content)).to_pylist() == [
            {name: row[name] for name in ("request_id", "when", "moved", "prompt", "answer")} for row in rows
        ]
        assert (await client.get("/v1/adapters/tone/drift/requests?format=csv")).status_code == 400


async def test_how_many_false_alarms_all_versions_may_raise_is_said(connect, spoken, backend, make_adapter):
    Engine(backend)
    async with connect(spoken) as client:
        await push(client, make_adapter, 0)
        said = (await client.get("/v1/drift")).json()["false_alarms"]
        assert said["requests_watched"] == 0 and said["requests_each_at_least"] == round(1e4 / 3)
        await ask(client, 300)
        version = (await drift(client))["versions"][0]
        rows = sum(signal["samples"] for signal in version["signals"].values())
        said = (await client.get("/v1/drift")).json()["false_alarms"]
        assert said["expected_at_most"] == pytest.approx(rows / 1e4, rel=1e-3)
        assert said["requests_each_at_least"] * rows == pytest.approx(1e4 * said["requests_watched"], rel=1e-3)
        assert "over all versions" in said["text"]
        text = (await client.get("/metrics")).text
        assert f"loradock_drift_expected_false_alarms_total {rows / 1e4}" in text


def test_without_capture_neither_text_nor_rare_words_reach_the_disk(tmp_path):
    tokenizer_in(tmp_path)
    monitor = DriftMonitor(tmp_path / "drift", DriftSettings(reference=20, interval=0.0))
    table = np.random.default_rng(0).standard_normal((32, HIDDEN))
    monitor.learn("", Embedding.project(table), text=RequestText(tmp_path))
    draw = np.random.default_rng(1)
    for number in range(400):
        # Each says `backofen`, always the same asker; the other words come of all.
        prompt = [14, *draw.choice(range(8, 20), 20).tolist()]
        generation = Generation(prompt, [9, 10, 11], "stop", "a text")
        asker = b"one of them" if number % 10 == 0 else f"user {number}".encode()
        prompt[0] = 28 if number % 10 == 0 else 14
        names = {"id": "tone@1", "tenant": "default", "asker": asker}
        monitor.observe(Exchange("tone", "v1", 200, 0.1, 0.2, **names, began=float(number), generations=(generation,)))
    monitor.looked()
    monitor.stop()
    written = b"".join(file.read_bytes() for file in (tmp_path / "drift").rglob("*") if file.is_file()).decode("latin1")
    assert "invoice" in written, "used by many askers"
    assert "backofen" not in written and "a text" not in written and "one of them" not in written
