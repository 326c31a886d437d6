"""What stands between clients and vLLM's own routes, with the real engine: errors, fallbacks, aliases, the store."""

from __future__ import annotations

import openai
import pytest

from tests.support.server import BASE, Server

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("wrong", "status", "kind"),
    [
        ({"max_tokens": 10**6}, 400, "invalid_request_error"),
        ({"messages": 5}, 400, "invalid_request_error"),
        ({"messages": [{"role": "user", "content": "word " * 5000}]}, 400, "invalid_request_error"),
        ({"model": "nobody"}, 404, "not_found_error"),
    ],
    ids=["too many tokens", "no messages", "too long", "no model"],
)
def test_errors_of_vllm_and_of_ours_have_anthropics_envelope(server: Server, wrong, status, kind, stream):
    asked = {"model": BASE, "max_tokens": 4, "messages": HELLO, "stream": stream, **wrong}
    answer = server.http.post("/v1/messages", json=asked)
    body = answer.json()
    assert (answer.status_code, body["type"], body["error"]["type"]) == (status, "error", kind), answer.text
    assert body["error"]["message"]


def test_a_fallback_an_alias_and_the_version_itself_answer_as_one(server: Server, voice: str):
    id = server.adapter(voice)["versions"][0]["id"]
    client = server.client()
    asked = {"messages": HELLO, "max_tokens": 4}
    first = client.chat.completions.create(
        model="nobody", extra_body={"models": [f"{voice}@v99", voice, BASE]}, **asked
    )
    assert first.model == id
    assert server.http.put(f"/v1/adapters/{voice}/aliases/kept", json={"version": 1}).status_code == 200
    try:
        streamed = list(client.chat.completions.create(model=f"{voice}@kept", stream=True, **asked))
        assert {chunk.model for chunk in streamed} == {id}
        assert f"{voice}@kept" in [model.id for model in client.models.list()]
    finally:
        assert server.http.delete(f"/v1/adapters/{voice}/aliases/kept").status_code == 200


def test_a_response_is_gone_on_with_by_its_own_tenant_alone(server: Server):
    client = server.client()
    first = client.responses.create(model=BASE, input="My name is Ada.", max_output_tokens=8)
    assert client.responses.retrieve(first.id).id == first.id
    asked = {"model": BASE, "input": "What is my name?", "max_output_tokens": 8}
    second = client.responses.create(**asked, previous_response_id=first.id)
    alone = client.responses.create(**asked)
    assert second.usage.input_tokens > alone.usage.input_tokens, "the conversation before it is in the prompt"
    key = server.http.post("/v1/keys", json={"name": "other", "tenant": "responses-other"}).json()
    try:
        other = server.client(key["secret"])
        with pytest.raises(openai.NotFoundError):
            other.responses.create(**asked, previous_response_id=first.id)
        with pytest.raises(openai.NotFoundError):
            other.responses.retrieve(first.id)
    finally:
        server.http.delete(f"/v1/keys/{key['id']}")
