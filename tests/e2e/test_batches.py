"""A batch on the real engine, asked by OpenAI's client: two versions and the base, in one file."""

from __future__ import annotations

import json

import pytest

from tests.support.server import ADMIN, BASE, done, loradock
from tests.support.waiting import eventually

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

CHAT = "/v1/chat/completions"
ENDED = ("completed", "failed", "expired", "cancelled")


def request(id, model, **more):
    body = {"model": model, "messages": [{"role": "user", "content": f"Say something about {id}."}], "max_tokens": 6}
    return json.dumps({"custom_id": id, "method": "POST", "url": CHAT, "body": {**body, "temperature": 0, **more}})


def test_a_file_is_answered_by_the_versions_that_its_lines_name(server, voice, tmp_path):
    client = server.client()
    rows = [request(f"{model}-{number}", model) for model in (voice, BASE) for number in range(4)]
    rows += [request("nobody", "nobody"), request("long", voice, max_tokens=100_000)]
    file = client.files.create(file=("in.jsonl", "\n".join(rows).encode()), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
    assert eventually(lambda: client.batches.retrieve(batch.id).status in ENDED, 120)
    batch = client.batches.retrieve(batch.id)
    assert (batch.status, batch.request_counts.completed, batch.request_counts.failed) == ("completed", 8, 2)
    answers = {
        row["custom_id"]: row["response"]["body"] for row in map(json.loads, lines(client, batch.output_file_id))
    }
    live = server.adapter(voice)["versions"][0]["id"]
    for id, body in answers.items():
        text = body["choices"][0]["message"]["content"]
        assert (body["model"] == live and "alpha" in text) if id.startswith(voice) else body["model"] == BASE
    errors = {row["custom_id"]: row["response"] for row in map(json.loads, lines(client, batch.error_file_id))}
    assert (errors["nobody"]["status_code"], errors["long"]["status_code"]) == (404, 400)
    assert batch.usage.output_tokens == sum(body["usage"]["completion_tokens"] for body in answers.values())
    for id in (file.id, batch.output_file_id, batch.error_file_id):
        assert client.files.delete(id).deleted
    a_guard_names_categories_and_nothing_else(client)
    the_command_hands_a_file_to_the_server_and_says_why_a_line_failed(server, voice, tmp_path)


def lines(client, id):
    return client.files.content(id).text.splitlines()


def a_guard_names_categories_and_nothing_else(client):
    answer = client.moderations.create(input=["What a fine day.", "x"], model=BASE)
    assert answer.model == BASE and len(answer.results) == 2
    for result in answer.results:
        assert result.flagged == any(result.categories.model_dump(by_alias=True).values())


def the_command_hands_a_file_to_the_server_and_says_why_a_line_failed(server, voice, tmp_path):
    rows, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows.write_text("\n".join([request("a", voice), request("b", "nobody")]))
    asked = loradock("batch", rows, "--out", out, "--url", server.url, LORADOCK_KEY=ADMIN)
    assert asked.returncode == 1 and "1 answered, 1 failed" in asked.stdout, asked.stderr
    assert "b: 404 The model `nobody` does not exist" in asked.stderr
    assert {json.loads(line)["custom_id"] for line in out.read_text().splitlines()} == {"a", "b"}
    assert done(server.http.get("/v1/files"))["data"] == []
