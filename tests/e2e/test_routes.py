"""What stands between clients and vLLM's own routes, with the real engine: errors, fallbacks, aliases, the store."""

from __future__ import annotations

from collections.abc import Iterator

import anthropic
import openai
import pytest

from tests.support.server import BASE, KEY, Server

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

HELLO = [{"role": "user", "content": "Hello"}]
ENDLESS = [{"role": "user", "content": "word " * 5000}]


@pytest.fixture
def claude(server: Server) -> Iterator[anthropic.Anthropic]:
    """Anthropic's own client, with a key."""
    with anthropic.Anthropic(api_key=KEY, base_url=server.url, max_retries=0) as client:
        yield client


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("wrong", "error", "kind"),
    [
        ({"max_tokens": 20_000}, anthropic.BadRequestError, "invalid_request_error"),
        ({"messages": 5}, anthropic.BadRequestError, "invalid_request_error"),
        (
            {"messages": [{"role": "user", "content": "word " * 5000}]},
            anthropic.BadRequestError,
            "invalid_request_error",
        ),
        ({"model": "nobody"}, anthropic.NotFoundError, "not_found_error"),
    ],
    ids=["too many tokens", "no messages", "too long", "no model"],
)
def test_anthropics_client_raises_its_own_errors_for_those_of_vllm_and_ours(claude, wrong, error, kind, stream):
    with pytest.raises(error) as raised:
        claude.messages.create(**{"model": BASE, "max_tokens": 4, "messages": HELLO, "stream": stream, **wrong})
    body = raised.value.body
    assert (body["type"], body["error"]["type"]) == ("error", kind) and body["error"]["message"]


def test_anthropics_client_gets_an_adapters_answer_whole_and_as_a_stream(claude, server: Server, voice: str):
    asked = {"model": voice, "max_tokens": 4, "messages": HELLO, "extra_body": {"temperature": 0}}
    whole = claude.messages.create(**asked)
    assert whole.role == "assistant" and whole.content[0].text and whole.usage.output_tokens == 4
    assert whole.model == server.adapter(voice)["versions"][0]["id"]
    with claude.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == whole.content[0].text
    assert claude.messages.count_tokens(model=voice, messages=HELLO).input_tokens == whole.usage.input_tokens


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
