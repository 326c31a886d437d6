"""Drift, canaries on trial and feedback, over a server whose engine is a fake that says what it generated."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from serve.asgi.exchange import Exchange, Generation
from serve.cli.baseline import prompts
from serve.drift.monitor import Watcher
from serve.errors import ConfigError
from serve.rollout.canary import CanaryTrials
from serve.rollout.policy import DEFAULT_POLICIES, Policy, parse, policy_for
from tests.support.app import upload
from tests.support.tiny import HIDDEN

CHAT = "/v1/chat/completions"
VOCABULARY = 32


@pytest.fixture
def watched(config, backend, tiny_model, tmp_path):
    """A configuration of a model that has an embedding table, with short baselines."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    table = torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(0))
    save_file({"model.embed_tokens.weight": table}, folder / "model.safetensors")
    backend.model = str(folder)
    return replace(config, model=str(folder), drift_reference=100, drift_threshold=1e4)


class Engine:
    """What the fake engine generates: a topic for the prompts, a delay and a skill for each adapter."""

    def __init__(self, backend, seed=0):
        self.lots = random.Random(seed)
        self.backend = backend
        self.topic = range(8, 20)
        self.slow = {}
        self.odd = set()
        backend.generate = self.generate

    def generate(self, body):
        draw = self.lots
        prompt = [1, 2, 3, *draw.choices(self.topic, k=draw.randint(8, 20)), 4, 5]
        model = body["model"]
        output = draw.choices(range(20, 32) if model in self.odd else range(8, 32), k=draw.randint(5, 30))
        gap = draw.lognormvariate(-4, 0.1) * self.slow.get(model, 1)
        logprobs = [draw.gauss(-3 if model in self.odd else -1, 0.3) for _ in output]
        return Generation(
            prompt, output, "length" if model in self.odd else "stop", "a text", 0.001, None, gap, 2 * gap, logprobs
        )


_askers = itertools.count()


async def ask(client, count, model="tone"):
    for _ in range(count):
        answer = await client.post(CHAT, json={"model": model, "user": f"u{next(_askers)}"})
        assert answer.status_code == 200


async def drift(client, name="tone"):
    await asyncio.to_thread(client._transport.app.state.parts.watcher.settle)
    return (await client.get(f"/v1/adapters/{name}/drift")).json()


async def until(condition):
    for _ in range(300):
        if await condition():
            return True
        await asyncio.sleep(0.01)
    return False


async def canary_ended(client):
    return (await client.get("/v1/adapters/tone")).json()["canary"] is None


async def push(client, make_adapter, *seeds):
    ids = []
    for seed in seeds:
        promote = str(seed == seeds[0]).lower()
        ids.append((await client.post("/v1/adapters", **upload(make_adapter(seed), promote=promote))).json()["id"])
    return ids


async def test_the_first_requests_are_the_reference_and_steady_traffic_raises_nothing(
    connect, watched, backend, make_adapter
):
    Engine(backend)
    async with connect(watched) as client:
        await push(client, make_adapter, 0)
        await ask(client, 400)
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
        await ask(client, 200)
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
        # One more request waits for the others that say what all prompts share.
        assert after == before
        await ask(client, 200)
        assert (await drift(client))["versions"][0]["signals"]["prompt"]["alarmed"]


async def test_a_canary_that_is_slower_is_ended_with_the_evidence_in_history_audit_and_metrics(
    connect, watched, backend, make_adapter
):
    engine = Engine(backend)
    async with connect(watched) as client:
        _, canary = await push(client, make_adapter, 0, 1)
        engine.slow[canary] = 1.25
        await client.post("/v1/adapters/tone/canary", json={"version": 2, "weight": 0.25})
        for _ in range(20):
            await ask(client, 50)
            await drift(client)
            if await canary_ended(client):
                break
        shown = (await client.get("/v1/adapters/tone")).json()
        assert shown["canary"] is None and shown["live"] == 1
        entry = shown["history"][-1]
        assert entry["who"] == "wayback" and "inter_token" in entry["why"]
        counted = 'loradock_rollbacks_total{adapter="tone",reason="latency",version="v2"} 1.0'

        async def told():
            return counted in (await client.get("/metrics")).text

        assert await until(told)
        log = watched.data_dir / "audit.jsonl"

        async def audited():
            last = json.loads(log.read_text().splitlines()[-1])
            return last["what"] == "canary_ended" and "inter_token" in last["evidence"]

        assert await until(audited)


async def test_a_damaged_canary_is_ended_within_sixty_of_its_requests(connect, watched, backend, make_adapter):
    engine = Engine(backend)
    async with connect(watched) as client:
        _, canary = await push(client, make_adapter, 0, 1)
        engine.odd.add(canary)
        await client.post("/v1/adapters/tone/canary", json={"version": 2, "weight": 0.1})
        for _ in range(100):
            await ask(client, 20)
            await drift(client)
            if await canary_ended(client):
                break
        used = sum(body["model"] == canary for body in backend.bodies)
        assert used <= 60 and (await client.get("/v1/adapters/tone")).json()["canary"] is None


async def test_by_policy_a_promote_begins_as_a_canary_and_ends_when_it_has_proved_itself(
    connect, watched, backend, make_adapter
):
    Engine(backend)
    policy = replace(DEFAULT_POLICIES[0], canary_weight=0.5, proved="promote", alpha=0.05)
    async with connect(replace(watched, policies=(policy,))) as client:
        await client.post("/v1/adapters", **upload(make_adapter(0)))
        await client.post("/v1/adapters", **upload(make_adapter(1)))
        shown = (await client.get("/v1/adapters/tone")).json()
        assert (shown["live"], shown["canary"]) == (1, {"version": 2, "weight": 0.5})
        for _ in range(40):
            await ask(client, 50)
            await drift(client)
            if (await client.get("/v1/adapters/tone")).json()["live"] == 2:
                break
        shown = (await client.get("/v1/adapters/tone")).json()
        assert (shown["live"], shown["canary"]) == (2, None)
        assert shown["history"][-1]["who"] == "referee" or shown["history"][-2]["who"] == "referee"


async def test_by_policy_a_canary_that_did_worse_is_held_back_until_somebody_insists(
    connect, watched, backend, make_adapter
):
    engine = Engine(backend)
    policy = replace(DEFAULT_POLICIES[0], worse="hold")
    async with connect(replace(watched, policies=(policy,))) as client:
        _, canary = await push(client, make_adapter, 0, 1)
        engine.odd.add(canary)
        await client.post("/v1/adapters/tone/canary", json={"version": 2, "weight": 0.5})
        await ask(client, 200)
        assert (await drift(client))["canary"]["verdict"] == "worse"
        shown = (await client.get("/v1/adapters/tone")).json()
        assert shown["canary"] == {"version": 2, "weight": 0.5}, "to hold is not to end"
        held = await client.post("/v1/adapters/tone/promote", json={"version": 2})
        assert held.status_code == 409 and "did worse" in held.json()["error"]["message"]
        insisted = await client.post("/v1/adapters/tone/promote", json={"version": 2, "at_once": True})
        assert insisted.status_code == 200 and insisted.json()["live"]


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
        assert "loradock_requests_total{" not in (await client.get("/metrics")).text, "nobody's requests"
        engine.topic = range(14, 30)
        await ask(client, 150)
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
        await ask(client, 200)
        assert await gathered() == 100
        backend.prepare = lambda heir: (setattr(heir, "generate", engine.generate), heir.effects.update(tone=3.0))
        refused = await client.post("/v1/engines/base/swap", json={"model": str(other)})
        assert refused.status_code == 409, refused.text
        await ask(client, 40)
        assert await gathered() == 100, "the one that serves is the one that is watched"
        backend.prepare = lambda heir: setattr(heir, "generate", engine.generate)
        assert (await client.post("/v1/engines/base/swap", json={"model": str(other)})).status_code == 200
        learned = client._transport.app.state.parts.watcher._bases
        assert await until(lambda: asyncio.sleep(0, "base" in learned))
        await ask(client, 50)
        assert 0 < await gathered() < 100


async def test_a_version_that_is_removed_leaves_nothing_of_what_was_known(connect, watched, backend, make_adapter):
    Engine(backend)
    async with connect(watched) as client:
        await push(client, make_adapter, 0)
        await ask(client, 60)
        await drift(client)
        client._transport.app.state.parts.watcher.save()
        assert list((watched.data_dir / "drift").glob("*/*/baseline.json"))
        assert (await client.delete("/v1/adapters/tone")).status_code == 200
        assert not list((watched.data_dir / "drift").glob("*/*"))


async def test_a_rating_is_joined_to_an_answer_by_its_id_once(client, backend, make_adapter):
    await push(client, make_adapter, 0)
    backend.generation = replace(backend.generation, text="Paris.")
    ids = [(await client.post(CHAT, json={"model": "tone"})).headers["x-request-id"] for _ in range(3)]
    said = [
        {"request_id": ids[0], "rating": 1},
        {"request_id": f"chatcmpl-{ids[1]}", "answer": " paris "},
        {"request_id": ids[2], "answer": "London"},
    ]
    ratings = [(await client.post("/v1/feedback", json=body)).json()["rating"] for body in said]
    assert ratings == [1, 1, 0]
    assert (await client.post("/v1/feedback", json=said[0])).status_code == 404
    for bad in ({"rating": 1}, {"request_id": ids[0]}, {"request_id": ids[0], "rating": 2}):
        assert (await client.post("/v1/feedback", json=bad)).status_code == 400
    text = (await client.get("/metrics")).text
    assert 'loradock_feedback_total{adapter="tone",rating="good",version="v1"} 2.0' in text
    assert 'loradock_feedback_total{adapter="tone",rating="bad",version="v1"} 1.0' in text


async def test_bad_ratings_alone_end_a_canary(connect, watched, backend, make_adapter):
    Engine(backend)
    async with connect(watched) as client:
        _, canary = await push(client, make_adapter, 0, 1)
        await client.post("/v1/adapters/tone/canary", json={"version": 2, "weight": 0.5})
        for _ in range(300):
            answer = await client.post(CHAT, json={"model": "tone", "user": f"u{next(_askers)}"})
            rating = 0.1 if answer.json()["model"] == canary else 0.9
            body = {"request_id": answer.headers["x-request-id"], "rating": rating}
            assert (await client.post("/v1/feedback", json=body)).status_code == 200
        await drift(client)
        assert await until(lambda: canary_ended(client))
        assert "rating" in (await client.get("/v1/adapters/tone")).json()["history"][-1]["why"]


async def test_another_tenant_cannot_rate_nor_see(operator, issue, make_adapter):
    acme, globex = await issue("acme"), await issue("globex")
    await acme.post("/v1/adapters", **upload(make_adapter()))
    id = (await acme.post(CHAT, json={"model": "tone"})).headers["x-request-id"]
    assert (await globex.post("/v1/feedback", json={"request_id": id, "rating": 0})).status_code == 404
    assert (await globex.get("/v1/adapters/tone/drift")).status_code == 404
    assert (await globex.get("/v1/adapters/base/drift")).status_code == 404
    assert (await acme.post("/v1/feedback", json={"request_id": id, "rating": 0})).status_code == 200


def test_log_probabilities_are_asked_for_in_short_runs_and_in_the_share_that_was_said(tmp_path):
    now = [0.0]
    watcher = Watcher(
        tmp_path, CanaryTrials(lambda _: None, lambda _: 1, lambda _: 0.01), logprobs=0.1, clock=lambda: now[0]
    )
    assert not watcher.wants_logprobs("tone"), "nobody looks yet"
    watcher._thread = True
    wanted = []
    for _ in range(40_000):
        now[0] += 0.1
        wanted.append(watcher.wants_logprobs("tone"))
    assert abs(sum(wanted) / len(wanted) - 0.1) < 0.03
    turns = sum(a != b for a, b in itertools.pairwise(wanted))
    assert turns < 0.02 * len(wanted), "not one by one"


async def test_a_full_queue_drops_and_counts_and_the_answer_goes_out(connect, watched, backend, make_adapter):
    Engine(backend)
    async with connect(watched) as client:
        watcher = client._transport.app.state.parts.watcher
        await push(client, make_adapter, 0)
        with watcher._lock:  # the worker waits for it
            for _ in range(2100):
                watcher.offer(Exchange("tone", "v1", 200, 0.1, 0.2, generations=(backend.generation,)))
            await ask(client, 1)
        assert watcher.dropped >= 90
        assert "loradock_tap_dropped_total" in (await client.get("/metrics")).text


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
            await ask(client, 60)
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


def test_a_policy_says_what_it_takes():
    every, tone = parse({"*": {"alpha": 0.02}, "tone": {"proved": "promote", "canary_weight": 0.1}})
    assert tone == Policy("tone", "rollback", "promote", 0.1, 0.02)
    assert policy_for((every, tone), "other") == every
    for wrong in (
        3,
        {"*": {"worse": "promote"}},
        {"*": {"weight": 1}},
        {"a": {"alpha": 2}},
        {"a": {"canary_weight": 1}},
    ):
        with pytest.raises(ConfigError, match="takes"):
            parse(wrong)
