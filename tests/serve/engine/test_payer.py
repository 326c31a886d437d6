"""What an engine computed is on somebody's account, or named as the operator's own: nothing is left over."""

from __future__ import annotations

import asyncio
import random
import zlib
from collections import Counter
from dataclasses import replace

import pytest
from starlette.responses import JSONResponse

from serve.asgi.exchange import Generation
from serve.config import keys_hashed
from serve.engine.payer import OPERATOR
from serve.rollout.policy import parse
from tests.serve.jobs.batches.conftest import lines_of, request
from tests.serve.loop.conftest import QUICK, tried
from tests.support.app import CHAT, issued, upload
from tests.support.backend import FakeBackend
from tests.support.golden import cases
from tests.support.trainer import COMMAND
from tests.support.waiting import settled
from tests.support.watched_traffic import Engine

COUNTED = ("prompt_tokens", "generated_tokens")


@pytest.fixture
async def guarded(connect, config, backend, make_adapter):
    """A server whose adapter acme/tone has a guard, `watch`; its operator, and a key of acme's."""
    backend.say = lambda body: "none" if "structured_outputs" in body else "yes"
    backend.generate = lambda body: Generation([1] * 7, [2] * 3, "stop", text="yes")
    policies = parse({"acme/tone": {"guard": {"prompt": "watch", "answer": "watch"}}})
    async with connect(replace(config, policies=policies, admin_keys=keys_hashed(["run"]))) as operator:
        operator.headers["authorization"] = "Bearer run"
        acme = await issued(operator, "acme", "inference", "adapters:write", tokens_per_minute=1_000_000)
        await operator.post("/v1/adapters", **upload(make_adapter(9), name="watch"))
        for seed in (0, 1):
            pushed = await acme.post("/v1/adapters", **upload(make_adapter(seed), promote=str(not seed).lower()))
            assert pushed.status_code == 201, pushed.text
        yield operator, acme


def parts_of(client):
    return client._transport.app.state.parts


async def spent(operator) -> Counter[tuple[str, str]]:
    """Tokens by tenant and cause."""
    answer = (await operator.get("/v1/usage")).json()
    tokens: Counter[tuple[str, str]] = Counter()
    for row in answer["data"]:
        for cause, part in row["causes"].items():
            tokens[row["tenant"], cause] += sum(part[name] for name in COUNTED)
        assert sum(row[name] for name in COUNTED) == sum(
            sum(part[name] for name in COUNTED) for part in row["causes"].values()
        )
    return tokens


class Scored(FakeBackend):
    """Also says the tokens of texts, and how likely a version finds a prompt: all but the `worse` one's are likely."""

    worse = ""

    def _answer(self, body):
        if self.paths[-1] == "/tokenize":
            text = body.get("prompt") or " ".join(message["content"] for message in body["messages"])
            return JSONResponse({"tokens": [1 + zlib.crc32(word.encode()) % 30 for word in text.split()]})
        if "prompt_logprobs" in body:
            value = {"logprob": -1.2 if body["model"] == self.worse else -0.1}
            rows = [None, *({str(token): value} for token in body["prompt"][1:])]
            return JSONResponse({"model": body["model"], "choices": [{"prompt_logprobs": rows}]})
        return super()._answer(body)


WORDS = [f"{first}{last}" for first in ("ka", "lo", "mi", "nu", "pe", "ro") for last in ("ta", "ve", "so", "ni", "du")]


async def chatted(acme, count):
    """So many questions, each unlike the others and rated well."""
    for number in range(count):
        words = " ".join(random.Random(number).sample(WORDS, 8))
        body = {"model": "tone", "messages": [{"role": "user", "content": words}], "user": f"u{number}"}
        answer = await acme.post(CHAT, json=body)
        assert answer.status_code == 200, answer.text
        rated = await acme.post("/v1/feedback", json={"request_id": answer.headers["x-request-id"], "rating": 1})
        assert rated.status_code == 200, rated.text


@pytest.fixture
def quick(monkeypatch):
    """What a loop looks at every few seconds it looks at soon."""
    monkeypatch.setenv("STAND_IN", "{}")
    monkeypatch.setattr("serve.jobs.schedule.LOOK_SECONDS", 0.03)
    for name in ("LOOK_SECONDS", "GATHER_SECONDS", "RETRY_SECONDS"):
        monkeypatch.setattr(f"serve.loop.driver.{name}", 0.03)


async def test_all_that_the_engine_computed_is_charged_to_somebody_or_named_as_the_operators_own(
    connect, watched, make_adapter, sdk, quick
):
    """Clients and their guard, moderation, a shadow, a golden set with a judge, a batch, a baseline, a replay, a try of
    a loop to its end, probes: one run."""
    backend = Scored(watched.model)
    Engine(backend)
    backend.say = lambda body: "none" if "structured_outputs" in body else "yes"
    loop = {**QUICK, "min_examples": 30, "gate": {**QUICK["gate"], "golden": 0.5}}
    policy = {"guard": {"prompt": "watch", "answer": "watch"}, "train_on_traffic": True, "loop": loop}
    config = replace(watched, policies=parse({"acme/tone": policy}), admin_keys=keys_hashed(["run"]))
    async with connect(config, backend) as operator:
        operator.headers["authorization"] = "Bearer run"
        parts = parts_of(operator)
        process = parts.fine_tuning.runner.process
        process.command, process.nice = COMMAND, 0
        acme = await issued(operator, "acme", "inference", "adapters:write", tokens_per_minute=1_000_000)
        await operator.post("/v1/adapters", **upload(make_adapter(9), name="watch"))
        pushed = [
            await acme.post("/v1/adapters", **upload(make_adapter(seed), promote=str(not seed).lower()))
            for seed in (0, 1)
        ]
        backend.worse = pushed[0].json()["id"]
        # Clients and their guard, streams too; and what is to be learned from.
        body = {"model": "tone", "messages": [{"role": "user", "content": "hello"}]}
        assert (await acme.post(CHAT, json={**body, "stream": True})).status_code == 200
        assert (await operator.post("/v1/moderations", json={"model": "watch", "input": "hello"})).status_code == 200
        await chatted(acme, 80)
        # A shadow, and a golden set with judges.
        assert (await acme.post("/v1/adapters/tone/shadow", json={"version": 2, "weight": 1})).status_code == 200
        assert (await acme.post(CHAT, json=body)).status_code == 200
        assert (await acme.post("/v1/adapters/tone/shadow", json={"version": 2, "weight": 0})).status_code == 200
        judge = {"model": "base", "template": "Good? {answer}"}
        golden = {"cases": [*cases(5), {"prompt": "Why?", "judge": judge}], "shadow": {"judge": judge, "share": 1}}
        put = await acme.put("/v1/adapters/tone/golden", json=golden)
        assert put.status_code == 200, put.text
        # A batch, a baseline, a replay.
        ai = sdk(acme)
        lines = lines_of([request(str(number), model="tone") for number in range(3)])
        file = await ai.files.create(file=("in.jsonl", lines), purpose="batch")
        batch = await ai.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")

        async def batched():
            return (await ai.batches.retrieve(batch.id)).status == "completed"

        assert await settled(batched)
        await asyncio.to_thread(parts.captures.worker.settle)
        asked = {"baseline": {"prompts": [f"prompt {number}" for number in range(20)]}}
        asked["versions/2/replay"] = {"requests": 4, "against": "live"}
        for what, fields in asked.items():
            answer = await acme.post(f"/v1/adapters/tone/{what}", json=fields)
            assert answer.status_code == 200, answer.text
        # A loop: its gate, and what it replays; then the prober.
        run = await acme.post("/v1/adapters/tone/loop/run")
        assert run.status_code in (200, 202), run.text
        attempt = await tried(acme)
        assert attempt["outcome"] == "promoted", attempt
        assert attempt["replay"]["requests"] > 5 and attempt["replay"]["judge"]["requests"], attempt
        await parts.prober.round()

        async def quiet():
            tokens = await spent(operator)
            causes = {cause for _, cause in tokens}
            return tokens if {"golden", "judge", "shadow"} <= causes and backend.computed == tokens.total() else None

        tokens = await settled(quiet)
        assert tokens, (backend.computed, await spent(operator))
        charged = {who for who in tokens if who[0] != OPERATOR}
        wanted = ("request", "guard", "shadow", "golden", "judge", "batch", "baseline", "replay", "loop")
        assert charged == {*(("acme", cause) for cause in wanted), ("default", "moderation")}
        assert {cause for tenant, cause in tokens if tenant == OPERATOR} == {"probe"}
        assert backend.computed == tokens.total()


async def test_a_golden_set_that_was_put_while_nothing_was_live_costs_the_key_that_put_it(
    operator, issue, backend, make_adapter
):
    backend.say, backend.generation = (lambda body: "yes"), Generation([1] * 7, [2] * 3, "stop", text="yes")
    pusher = await issue("acme", "adapters:write", name="pusher")
    limited = await issue("acme", "inference", "adapters:write", name="limited", tokens_per_minute=100)
    pushed = await pusher.post("/v1/adapters", **upload(make_adapter(), promote="false"))
    assert pushed.status_code == 201
    assert (await limited.put("/v1/adapters/tone/golden", json={"cases": cases(40)})).status_code == 200
    assert (await pusher.post("/v1/adapters/tone/promote", json={"version": 1})).status_code == 200

    async def all_spent():
        return (await spent(operator))["acme", "golden"] >= 100

    parts_of(operator).golden.runs.wake()
    assert await settled(all_spent)
    await asyncio.sleep(0.3)
    used = (await spent(operator))["acme", "golden"]
    assert used < 40 * 10, "what the key may not use now is asked later"
    refused = await limited.post(CHAT, json={"model": "base", "messages": []})
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")


async def test_a_guards_question_waits_in_the_turn_of_whoever_asked(guarded, backend, monkeypatch):
    _, acme = guarded
    seated = []
    queue = type(parts_of(acme).fleet.first.engine.queue)
    enter = queue.enter

    def noted(self, tenant, adapter=None, **more):
        seated.append((tenant, adapter and adapter.partition("@")[0]))
        return enter(self, tenant, adapter, **more)

    monkeypatch.setattr(queue, "enter", noted)
    answer = await acme.post(CHAT, json={"model": "tone", "messages": [{"role": "user", "content": "hello"}]})
    assert answer.status_code == 200
    assert await settled(lambda: len(seated) == 3)
    assert seated == [("acme", "watch"), ("acme", "acme/tone"), ("acme", "watch")]


async def test_a_guards_tokens_are_on_the_key_that_asked(guarded):
    operator, _ = guarded
    limited = await issued(operator, "acme", "inference", name="limited", tokens_per_minute=1000)
    body = {"model": "tone", "messages": [{"role": "user", "content": "hello"}]}
    assert (await limited.post(CHAT, json=body)).status_code == 200
    plain = await limited.post(CHAT, json={**body, "model": "base"})
    # The first one's answer, and the two of its guard; of this one nothing yet.
    assert int(plain.headers["x-ratelimit-remaining-tokens"]) == pytest.approx(1000 - 30, abs=5)
