"""`auto`: the adapter that is asked such prompts answers, or the default; the key's rights, and what is said of it."""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import replace

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from serve.config import keys_hashed
from serve.rollout.policy import parse
from tests.support.app import CHAT, issued, upload
from tests.support.backend import FakeBackend
from tests.support.waiting import settled

WORDS = """
sql: select table join where order rows column index group count query insert
law: court contract clause party liable appeal judge statute breach damages tort claim
cook: bake flour butter oven sugar whisk salt onion simmer garlic dough yeast
"""
TOPICS = {line.partition(":")[0]: line.partition(":")[2].split() for line in WORDS.strip().splitlines()}
COMMON = ["the", "a", "of", "to", "is", "how", "what", "in", "and", "for"]
ELSEWHERE = ["planet", "orbit", "comet", "star", "galaxy", "moon", "rocket", "crater", "dust", "eclipse"]
POLICIES = {"sql": {"auto": True}, "law": {"auto": True}, "cook": {"auto": True}}


def prompt(words, seed):
    draw = random.Random(f"{words[0]} {seed}")
    return " ".join(draw.choice(words if draw.random() < 0.6 else COMMON) for _ in range(draw.randint(10, 16)))


@pytest.fixture
def routed(watched, backend):
    """A configuration of a model with words for tokens, over which three adapters take part."""
    words = [*COMMON, *ELSEWHERE, *(word for topic in TOPICS.values() for word in topic)]
    tokenizer = Tokenizer(WordLevel({"?": 0} | {word: i for i, word in enumerate(words, 1)}, unk_token="?"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(f"{watched.model}/tokenizer.json")
    return replace(watched, policies=parse(POLICIES), admin_keys=keys_hashed(["run"]))


async def refer(client, name, words=None, count=60):
    """Give an adapter a reference of such prompts."""
    prompts = [[{"role": "user", "content": prompt(words or TOPICS[name], seed)}] for seed in range(count)]
    built = await client.post(f"/v1/adapters/{name}/baseline", json={"prompts": prompts})
    assert built.status_code == 200, built.text


async def push(client, folder, name, **fields):
    pushed = await client.post("/v1/adapters", **upload(folder, name, **fields))
    assert pushed.status_code == 201, pushed.text


@pytest.fixture
async def three(connect, routed, make_adapter):
    async with connect(routed) as client:
        client.headers["authorization"] = "Bearer run"
        for seed, name in enumerate(TOPICS):
            await push(client, make_adapter(seed), name)
            await refer(client, name)
        yield client


async def auto(client, text, model="auto", path=CHAT, **fields):
    body = {"prompt": text} if path == "/v1/completions" else {"messages": [{"role": "user", "content": text}]}
    answer = await client.post(path, json={"model": model, **body, **fields})
    assert answer.status_code == 200, answer.text
    return answer


def chosen(answer):
    name, *more = answer.headers["x-loradock-auto"].split("; ")
    return name, dict(part.split("=") for part in more)


async def test_each_prompt_goes_to_the_adapter_that_is_asked_such(three):
    right = 0
    for name, words in TOPICS.items():
        for seed in range(1000, 1020):
            answer = await auto(three, prompt(words, seed))
            told, why = chosen(answer)
            right += told == name and answer.headers["x-loradock-version"] == f"{name}@v1"
            assert told != name or (why["reason"] == "fits" and float(why["margin"]) >= 1)
    assert right >= 57
    elsewhere = [chosen(await auto(three, prompt(ELSEWHERE, seed))) for seed in range(20)]
    assert sum(told == "base" for told, _ in elsewhere) >= 18
    assert {why["reason"] for told, why in elsewhere if told == "base"} <= {"foreign", "close"}


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/messages", "/tokenize"])
async def test_every_route_that_has_a_prompt_takes_it(three, path):
    assert chosen(await auto(three, prompt(TOPICS["law"], 7), path=path))[0] == "law"


async def test_a_response_is_chosen_by_its_input_and_a_batch_line_by_its_own(three):
    text = prompt(TOPICS["cook"], 7)
    answer = await three.post("/v1/responses", json={"model": "auto", "input": text})
    assert chosen(answer)[0] == "cook"
    stored = await three.post("/v1/responses", json={"model": "auto", "input": text, "previous_response_id": "resp_1"})
    assert stored.status_code == 400 and "name the model" in stored.json()["error"]["message"]
    body = {"model": "auto", "messages": [{"role": "user", "content": text}]}
    line = {"custom_id": "1", "method": "POST", "url": CHAT, "body": body}
    files = {"file": ("lines.jsonl", json.dumps(line).encode())}
    file = (await three.post("/v1/files", data={"purpose": "batch"}, files=files)).json()["id"]
    made = {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h"}
    batch = (await three.post("/v1/batches", json=made)).json()["id"]

    async def answers():
        return (await three.get(f"/v1/batches/{batch}")).json()["output_file_id"]

    output = (await three.get(f"/v1/files/{await settled(answers)}/content")).json()
    assert output["response"]["body"]["model"].startswith("cook@")


async def test_a_conversation_stays_where_its_first_message_brought_it(three):
    first, later = prompt(TOPICS["sql"], 3), prompt(TOPICS["cook"], 4)
    turns = [("user", first), ("assistant", later), ("user", later), ("assistant", first), ("user", "and the moon")]
    messages = [{"role": role, "content": content} for role, content in turns]
    for end in (1, 3, 5):
        answer = await three.post(CHAT, json={"model": "auto", "messages": messages[:end]})
        assert chosen(answer)[0] == "sql"


async def test_what_has_no_text_or_no_reference_is_the_defaults(connect, routed, make_adapter):
    async with connect(routed) as client:
        client.headers["authorization"] = "Bearer run"
        text = prompt(TOPICS["law"], 5)
        missing = await client.post(CHAT, json={"model": "auto", "messages": []})
        assert missing.status_code == 404 and "`auto: true`" in missing.json()["error"]["message"]
        await push(client, make_adapter(0), "law")
        assert chosen(await auto(client, text)) == ("base", {"reason": "no_reference"})
        assert (await client.get("/v1/adapters/law")).json()["auto"] == "gathering"
        await refer(client, "law")
        assert (await client.get("/v1/adapters")).json()["data"][0]["auto"] == "yes"
        assert chosen(await auto(client, text)) == ("law", {"reason": "fits"}), "there is no next one"
        empty = await client.post(CHAT, json={"model": "auto", "messages": []})
        assert chosen(empty) == ("base", {"reason": "no_text"})


async def test_what_the_base_is_asked_by_name_stands_for_what_is_no_adapters(three):
    for seed in range(230):
        await auto(three, prompt(ELSEWHERE, seed), model="base", user=f"b{seed}")
    parts = three._transport.app.state.parts
    await asyncio.to_thread(parts.exchange_worker.settle)
    told = [chosen(await auto(three, prompt(ELSEWHERE, 5000 + seed))) for seed in range(20)]
    assert all(name == "base" and why["reason"] == "foreign" for name, why in told)
    assert min(float(why["margin"]) for _, why in told) > 1, "it fits the base better than any adapter"
    law = [chosen(await auto(three, prompt(TOPICS["law"], 5000 + seed)))[0] for seed in range(20)]
    assert law.count("law") >= 19


async def test_an_adapter_may_be_the_default(connect, routed, make_adapter):
    policies = parse({**POLICIES, "cook": {"auto": "default"}})
    async with connect(replace(routed, policies=policies)) as client:
        client.headers["authorization"] = "Bearer run"
        for seed, name in enumerate(TOPICS):
            await push(client, make_adapter(seed), name)
            await refer(client, name)
        told = [chosen(await auto(client, prompt(ELSEWHERE, seed)))[0] for seed in range(10)]
        assert told.count("cook") >= 9
        assert (await client.get("/v1/adapters/cook")).json()["auto"] == "default"


async def test_a_key_is_never_routed_to_an_adapter_that_it_may_not_ask(connect, routed, make_adapter):
    policies = parse({"acme/sql": {"auto": True}, "acme/law": {"auto": True}, "globex/cook": {"auto": True}})
    async with connect(replace(routed, policies=policies)) as operator:
        operator.headers["authorization"] = "Bearer run"
        acme, globex = [await issued(operator, tenant, "inference", "adapters:write") for tenant in ("acme", "globex")]
        await push(acme, make_adapter(0), "sql", visibility="shared")
        await push(acme, make_adapter(1), "law")
        await push(globex, make_adapter(2), "cook")
        for client, name in ((acme, "sql"), (acme, "law"), (globex, "cook")):
            await refer(client, name)
        law, sql = prompt(TOPICS["law"], 9), prompt(TOPICS["sql"], 9)
        assert chosen(await auto(acme, law))[0] == "law"
        told, _ = chosen(await auto(globex, law))
        assert told == "base", "a private adapter of another tenant"
        assert chosen(await auto(globex, sql))[0] == "acme/sql", "a shared one"
        assert chosen(await auto(globex, sql, model="auto:acme/*"))[0] == "acme/sql"
        assert chosen(await auto(acme, sql, model="auto:s*"))[0] == "sql"
        assert chosen(await auto(acme, law, model="auto:s*"))[0] == "base"
        hidden = await globex.post(CHAT, json={"model": "auto:acme/law", "messages": []})
        assert hidden.status_code == 404, "not even its name is known"


async def test_it_is_counted_listed_and_no_adapter_loses_its_name(three, make_adapter):
    for seed in range(5):
        await auto(three, prompt(TOPICS["law"], seed))
    text = (await three.get("/metrics")).text
    name = 'loradock_auto_requests_total{adapter="law",reason="fits"'
    [line] = [line for line in text.splitlines() if line.startswith(name)]
    assert float(line.split()[-1]) >= 4
    assert "loradock_auto_margin_nats_bucket" in text
    models = await three.post(CHAT, json={"models": ["nobody", "auto"], "messages": []})
    assert chosen(models)[0] == "base"
    assert (await three.get("/v1/models")).json()["data"][-1]["id"] == "auto"
    embedding = await three.post("/v1/embeddings", json={"model": "auto", "input": "a"})
    assert embedding.status_code == 400 and "has none" in embedding.json()["error"]["message"]
    several = await three.post("/v1/completions", json={"model": "auto", "prompt": ["a", "b"]})
    assert several.status_code == 400
    await push(three, make_adapter(5), "auto")
    answer = await three.post(CHAT, json={"model": "auto", "messages": []})
    assert answer.headers["x-loradock-version"] == "auto@v1" and "x-loradock-auto" not in answer.headers
    assert (await three.get("/v1/models")).json()["data"][-1]["id"] != "auto"


async def test_a_new_version_and_a_new_server_go_on_with_the_reference(connect, routed, make_adapter):
    text = prompt(TOPICS["law"], 5)
    async with connect(routed) as client:
        client.headers["authorization"] = "Bearer run"
        await push(client, make_adapter(0), "law")
        await refer(client, "law")
        await push(client, make_adapter(7), "law")
        assert (await auto(client, text)).headers["x-loradock-version"] == "law@v2"
    async with connect(routed, FakeBackend(routed.model)) as client:
        client.headers["authorization"] = "Bearer run"
        assert (await auto(client, text)).headers["x-loradock-version"] == "law@v2"


async def test_what_auto_chose_tells_nothing_of_the_prompts_that_it_was_chosen_by(three):
    """Its own reference chose it, so it could only say that nothing has changed."""

    async def signals():
        parts = three._transport.app.state.parts
        await asyncio.to_thread(parts.exchange_worker.settle)
        (version,) = (await three.get("/v1/adapters/law/drift")).json()["versions"]
        return version["signals"]

    before = await signals()
    for seed in range(200):
        await auto(three, prompt(TOPICS["law"], 2000 + seed), user=f"u{seed}")
    after = await signals()
    assert after["prompt"]["samples"] == before["prompt"]["samples"]
    assert after["output"]["samples"] > before["output"]["samples"]
    for seed in range(200):
        await auto(three, prompt(TOPICS["law"], 4000 + seed), model="law", user=f"d{seed}")
    assert (await signals())["prompt"]["samples"] > after["prompt"]["samples"], "asked by name, it is compared"


async def test_a_removed_adapter_takes_no_part(three):
    assert (await three.delete("/v1/adapters/law")).status_code == 200
    assert chosen(await auto(three, prompt(TOPICS["law"], 5)))[0] == "base"
    fits = three._transport.app.state.parts.drift_monitor.fits
    assert await settled(lambda: not any(id.startswith("law@") for id in fits._counts))
