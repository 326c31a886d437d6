"""Captured traffic of an adapter becomes files of its tenant, and nobody else's."""

from __future__ import annotations

import asyncio
import errno
import io
import json
import threading
from dataclasses import replace

import openai
import pytest

from serve.asgi.exchange import Exchange
from serve.config import keys_hashed
from serve.dataset.capture import QUEUE_SIZE
from serve.rollout.policy import parse
from tests.support.app import CHAT, issued, upload
from tests.support.waiting import settled

LEARNS = parse({"*": {"train_on_traffic": True}})


@pytest.fixture
async def learning(connect, config, backend, make_adapter):
    """An operator's client of a server whose adapters learn, with the adapter `tone`."""
    backend.generate = lambda fields: replace(backend.generation, text=f"answer to {fields['messages'][-1]['content']}")
    async with connect(replace(config, admin_keys=keys_hashed(["run"]), policies=LEARNS)) as client:
        client.headers["authorization"] = "Bearer run"
        assert (await client.post("/v1/adapters", **upload(make_adapter()))).status_code == 201
        yield client


async def asked(client, text, model="tone", **feedback):
    """A request's id, which was answered and maybe rated."""
    body = {"model": model, "messages": [{"role": "user", "content": text}]}
    answer = await client.post(CHAT, json=body)
    assert answer.status_code == 200, answer.text
    id = answer.headers["x-request-id"]
    if feedback:
        rated = await client.post("/v1/feedback", json={"request_id": id, **feedback})
        assert rated.status_code == 200, rated.text
    return id


async def kept(client, count, name="tone"):
    """Wait until so many requests are kept."""
    captures = client._transport.app.state.parts.captures
    await settled(lambda: captures.worker._done >= captures.worker._offered)
    rows = (await client.get(f"/v1/adapters/{name}/data/conversations")).json()["data"]
    assert sum(row["requests"] for row in rows) == count


async def test_traffic_becomes_files_that_a_job_takes(learning):
    for number in range(30):
        await asked(learning, f"what is the {number}th of {number * 7919} things?", rating=1)
    await asked(learning, "what is wrong here?", answer="this is right")
    await asked(learning, "and what is this?", rating=0)
    await kept(learning, 32)
    built = (await learning.post("/v1/adapters/tone/data", json={"held_out": 0.2})).json()
    card = built["card"]
    assert card["captured"] == 32 and card["dropped"]["rated_down"] == 1
    sources = {name: sum(side[name] for side in card["sources"].values()) for name in ("corrected", "rated_up")}
    assert sources == {"corrected": 1, "rated_up": 30}
    ai = openai.AsyncOpenAI(base_url="http://localhost/v1", api_key="run", http_client=learning, max_retries=0)
    file = await ai.files.retrieve(built["training_file"])
    assert (file.purpose, file.filename) == ("fine-tune", "tone-train.jsonl")
    lines = (await ai.files.content(file.id)).text.splitlines()
    assert len(lines) == card["examples"]["train"] and "messages" in json.loads(lines[0])
    both = {"training_file": built["training_file"], "validation_file": built["validation_file"]}
    job = await ai.fine_tuning.jobs.create(model="base", suffix="next", **both)
    await ai.fine_tuning.jobs.cancel(job.id)
    again = (await learning.post("/v1/adapters/tone/data", json={"held_out": 0.2})).json()
    assert again == built


class Filling(io.FileIO):
    """A file on a disk that has room for ten bytes."""

    left = 10

    def write(self, data):
        if not self.left:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = super().write(memoryview(data)[: self.left])
        self.left -= taken
        return taken


async def test_a_disk_that_is_full_in_the_middle_of_a_file_leaves_none(learning, monkeypatch):
    await asked(learning, "what fits?", rating=1)
    await kept(learning, 1)
    with monkeypatch.context() as full:
        full.setattr("serve.jobs.batches.file_bytes.create", lambda path: Filling(path, "xb"))
        refused = await learning.post("/v1/adapters/tone/data", json={"held_out": 0})
    assert refused.status_code == 507, refused.text
    assert (await learning.get("/v1/files")).json()["data"] == []
    built = (await learning.post("/v1/adapters/tone/data", json={"held_out": 0})).json()
    content = await learning.get(f"/v1/files/{built['training_file']}/content")
    assert json.loads(content.text)["messages"][0]["content"] == "what fits?"


async def test_what_finds_no_room_to_wait_until_it_is_written_is_counted(learning, backend):
    captures = learning._transport.app.state.parts.captures
    answered = Exchange("tone", "v1", 200, 0.1, 0.2, generations=(backend.generation,))
    with captures.conversations._writing:  # the worker waits for it
        for _ in range(QUEUE_SIZE + 50):
            captures.worker.offer(answered)
        (line,) = [
            line
            for line in (await learning.get("/metrics")).text.splitlines()
            if line.startswith('loradock_exchanges_dropped_total{worker="capture"}')
        ]
    assert float(line.split()[-1]) == captures.worker.dropped >= 49
    assert 'loradock_exchanges_dropped_total{worker="data_quality"} 0.0' in (await learning.get("/metrics")).text


async def test_a_late_correction_still_counts(learning):
    id = await asked(learning, "what was that?")
    await kept(learning, 1)
    learning._transport.app.state.parts._feedback._recent.clear()
    late = {"request_id": f"chatcmpl-{id}", "answer": "it was a bird"}
    assert (await learning.post("/v1/feedback", json=late)).status_code == 200
    assert (await learning.post("/v1/feedback", json=late)).status_code == 404
    built = (await learning.post("/v1/adapters/tone/data", json={"held_out": 0})).json()
    assert built["card"]["sources"]["train"]["corrected"] == 1 and built["validation_file"] is None


async def test_what_is_said_while_the_disk_is_full_can_be_said_again(learning):
    id = await asked(learning, "what was that?")
    await kept(learning, 1)
    conversations = learning._transport.app.state.parts.captures.conversations
    nbytes = conversations._file.stat().st_size
    conversations._writer.execute(f"pragma max_page_count = {nbytes // 4096}")
    said = {"request_id": id, "answer": "it was a bird " * 5000}
    refused = await learning.post("/v1/feedback", json=said)
    assert refused.status_code == 507 and "make room" in refused.json()["error"]["message"]
    conversations._writer.execute("pragma max_page_count = 100000")
    assert (await learning.post("/v1/feedback", json=said)).status_code == 200
    assert (await learning.post("/v1/feedback", json=said)).status_code == 404
    built = (await learning.post("/v1/adapters/tone/data", json={"held_out": 0})).json()
    assert built["card"]["sources"]["train"]["corrected"] == 1


async def test_a_tenant_has_one_build_at_a_time(learning, make_adapter, monkeypatch):
    datasets = learning._transport.app.state.parts.captures.datasets
    begun, goes_on, build = threading.Event(), threading.Event(), datasets._build

    def slow(*asked):
        begun.set()
        goes_on.wait(30)
        return build(*asked)

    monkeypatch.setattr(datasets, "_build", slow)
    acme = await issued(learning, "acme")
    assert (await acme.post("/v1/adapters", **upload(make_adapter()))).status_code == 201
    mine = asyncio.create_task(learning.post("/v1/adapters/tone/data"))
    assert await asyncio.to_thread(begun.wait, 30)
    refused = await learning.post("/v1/adapters/tone/data")
    assert refused.status_code == 409 and "ask again when it has ended" in refused.json()["error"]["message"]
    other = asyncio.create_task(acme.post("/v1/adapters/tone/data"))
    assert await settled(lambda: ("build", "acme") in datasets._asking)
    goes_on.set()
    assert [(await asking).status_code for asking in (mine, other)] == [200, 200]
    assert (await learning.post("/v1/adapters/tone/data")).status_code == 200
    with datasets.alone("replay", "default"):
        refused = await learning.post("/v1/adapters/tone/versions/1/replay")
        assert refused.status_code == 409 and "another replay of this tenant's" in refused.json()["error"]["message"]


async def test_a_deleted_conversation_is_in_no_later_build(learning, config):
    ids = [await asked(learning, f"tell me of {number * 104_729}", rating=1) for number in range(3)]
    await kept(learning, 3)
    deleted = await learning.delete(f"/v1/adapters/tone/data/conversations/{ids[1]}")
    assert deleted.json()["deleted"] and deleted.json()["requests"] == 1
    assert (await learning.delete(f"/v1/adapters/tone/data/conversations/{ids[1]}")).status_code == 404
    built = (await learning.post("/v1/adapters/tone/data", json={"held_out": 0})).json()
    content = await learning.get(f"/v1/files/{built['training_file']}/content")
    assert "104729" not in content.text and len(content.text.splitlines()) == 2
    assert f"tone {ids[1]}" in (config.data_dir / "audit.jsonl").read_text()


async def test_a_turn_that_was_answered_a_moment_ago_is_deleted_with_its_conversation(learning):
    first = await asked(learning, "tell me of birds")
    await kept(learning, 1)
    said = [{"role": "user", "content": "tell me of birds"}]
    said += [{"role": "assistant", "content": "answer to tell me of birds"}, {"role": "user", "content": "and fish"}]
    await learning.post(CHAT, json={"model": "tone", "messages": said})
    deleted = await learning.delete(f"/v1/adapters/tone/data/conversations/{first}")
    assert deleted.json()["requests"] == 2
    await kept(learning, 0)


async def test_an_adapter_that_does_not_learn_keeps_nothing_and_says_so(connect, config, make_adapter, backend):
    backend.generation = replace(backend.generation, text="yes")
    async with connect(config) as client:
        await client.post("/v1/adapters", **upload(make_adapter()))
        await asked(client, "will you learn?", rating=1)
        refused = await client.post("/v1/adapters/tone/data")
        assert refused.status_code == 409 and "train_on_traffic" in refused.json()["error"]["message"]
        answer = (await client.get("/v1/adapters/tone/data/conversations")).json()
        assert answer == {"object": "list", "learns": False, "data": []}
    assert not (config.data_dir / "conversations.db").exists()


async def test_options_that_cannot_be_are_refused(learning):
    for wrong in ({"held_out": 0.9}, {"since": 5, "until": 4}, {"balance": 0}, {"max_examples": 0}, {"seeds": 1}):
        refused = await learning.post("/v1/adapters/tone/data", json=wrong)
        assert refused.status_code == 400, wrong
    assert (await learning.post("/v1/adapters/none/data")).status_code == 404


async def test_no_tenant_learns_from_or_of_another(learning, make_adapter):
    acme, rival = await issued(learning, "acme"), await issued(learning, "rival")
    await acme.post("/v1/adapters", **upload(make_adapter(1), visibility="shared"))
    mine = await asked(acme, "acme asks its own", rating=1)
    await asked(rival, "rival asks what is shared", model="acme/tone", rating=1)
    await asked(rival, "rival asks the base", model="base", rating=1)
    await asked(acme, "acme asks the base", model="base", rating=1)
    await kept(acme, 1)
    everything = {"held_out": 0, "bases": True}
    built = (await acme.post("/v1/adapters/tone/data", json=everything)).json()
    content = (await acme.get(f"/v1/files/{built['training_file']}/content")).text
    assert "acme asks its own" in content and "acme asks the base" in content and "rival" not in content
    path = "/v1/adapters/acme/tone/data"
    for client, status in ((rival, 404), (learning, 403)):
        assert (await client.post(path, json=everything)).status_code == status
        assert (await client.get(f"{path}/conversations")).status_code == status
        assert (await client.get(f"{path}/progress")).status_code == status
        assert (await client.delete(f"{path}/conversations/{mine}")).status_code == status
        assert (await client.get(f"/v1/files/{built['training_file']}")).status_code == 404
    assert (await learning.delete(f"/v1/adapters/tone/data/conversations/{mine}")).status_code == 404
    reader = await issued(learning, "acme", "inference")
    assert (await reader.post(path)).status_code == 403
    await kept(acme, 1)


async def test_a_version_answers_again_and_is_compared(learning, make_adapter, backend):
    await learning.post("/v1/adapters", **upload(make_adapter(1), promote="false"))
    for number in range(4):
        await asked(learning, f"question {number}", rating=1)
    await asked(learning, "the last question", answer="what nobody said")
    await kept(learning, 5)
    backend.say = lambda body: (
        f"answer to {body['messages'][-1]['content']}" if "1" in str(body["messages"]) else "something else"
    )
    told = (await learning.post("/v1/adapters/tone/versions/2/replay", json={"examples": 2})).json()
    assert told["requests"] == 5 and told["agreement"]["exact"] == 0.2 and told["answered_by"] == {"v1": 5}
    assert told["ratings"] == {"rated": 5, "given": 0.8, "known": 1, "low": 0.2, "high": 1.0}
    assert len(told["examples"]) == 2 and told["examples"][0]["candidate"] == "something else"
    assert all(body["temperature"] == 0 for body in backend.bodies[-5:])
    live = (await learning.post("/v1/adapters/tone/versions/2/replay", json={"against": "live"})).json()
    assert live["agreement"]["exact"] == 1.0
    await kept(learning, 5)  # a replay is no traffic


async def test_what_cannot_be_replayed_is_a_sentence(learning, make_adapter):
    path = "/v1/adapters/tone/versions/1/replay"
    nothing = await learning.post(path)
    assert nothing.status_code == 409 and "no request to tone is kept" in nothing.json()["error"]["message"]
    assert (await learning.post(path, json={"against": "live"})).status_code == 409
    assert (await learning.post(path, json={"requests": 0})).status_code == 400
    assert (await learning.post("/v1/adapters/tone/versions/9/replay")).status_code == 404
    acme, rival = await issued(learning, "acme"), await issued(learning, "rival")
    await acme.post("/v1/adapters", **upload(make_adapter(1), visibility="shared"))
    for client, status in ((rival, 404), (learning, 403)):
        assert (await client.post("/v1/adapters/acme/tone/versions/1/replay")).status_code == status
