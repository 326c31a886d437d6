"""What OpenAI's own client asks works as it does against vLLM's server, for the base and for an adapter."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import openai
import pytest

from tests.support.server import AS_ON_A_GPU, BASE, Answer, Server, refused
from tests.support.waiting import eventually

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

FRANCE: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]

# Keys of vLLM 0.32's answers, taken from its own server.
ALWAYS = "id object created model choices"
CHAT = (
    f"{ALWAYS} service_tier system_fingerprint usage prompt_logprobs prompt_token_ids prompt_text kv_transfer_params "
    "ec_transfer_params metrics"
)
CHAT_CHOICE = "index message logprobs finish_reason stop_reason token_ids routed_experts"
MESSAGE = "role content refusal annotations audio function_call reasoning"
USAGE = "prompt_tokens total_tokens completion_tokens prompt_tokens_details completion_tokens_details"
CHUNKS = [
    (f"{ALWAYS} prompt_token_ids prompt_text", "index delta logprobs finish_reason"),
    (ALWAYS, "index delta logprobs finish_reason token_ids"),
    (ALWAYS, "index delta logprobs finish_reason stop_reason token_ids"),
    (f"{ALWAYS} system_fingerprint usage", None),
]
COMPLETION = f"{ALWAYS} service_tier system_fingerprint usage kv_transfer_params ec_transfer_params metrics"
COMPLETION_CHOICE = (
    "index text logprobs finish_reason stop_reason token_ids prompt_logprobs prompt_token_ids routed_experts"
)
RESPONSE = (
    "id created_at incomplete_details instructions metadata model object output parallel_tool_calls temperature "
    "tool_choice tools top_p background max_output_tokens max_tool_calls previous_response_id prompt reasoning "
    "service_tier status text top_logprobs truncation usage user presence_penalty frequency_penalty kv_transfer_params "
    "ec_transfer_params input_messages output_messages"
)
EVENTS = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
    "response.incomplete",
]

TOOL: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "enum": ["Paris", "Rome"]},
                "unit": {"type": "string", "enum": ["C", "F"]},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(params=["base", "adapter"])
def model(request: pytest.FixtureRequest) -> str:
    """The base, or an adapter that answers alpha."""
    return BASE if request.param == "base" else request.getfixturevalue("voice")


@pytest.fixture(params=["base", "adapter"])
def able(request: pytest.FixtureRequest) -> str:
    """The base, or an adapter that leaves it its skills."""
    return BASE if request.param == "base" else request.getfixturevalue("faint")


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return server.client()


@pytest.fixture
def identity(server: Server, model: str) -> str:
    """What an answer's `model` field must say."""
    return identity_of(server, model)


def identity_of(server: Server, model: str) -> str:
    return BASE if model == BASE else server.adapter(model)["versions"][0]["id"]


def sounds_right(model: str, text: str) -> bool:
    return "Paris" in text if model == BASE else Answer(text=text.lstrip()).word == "alpha"


def test_a_chat_answers_in_words_and_says_who_answered(client, model, identity):
    answer = client.chat.completions.create(model=model, messages=FRANCE, max_tokens=16, temperature=0)
    assert sounds_right(model, answer.choices[0].message.content)
    assert answer.model == identity
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_says_the_same_as_the_whole_answer_and_ends_with_its_usage(client, model, identity):
    ask: dict[str, Any] = {"model": model, "messages": FRANCE, "max_tokens": 16, "temperature": 0}
    whole = client.chat.completions.create(**ask)
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert {chunk.model for chunk in chunks} == {identity}
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == whole.choices[0].finish_reason


def test_a_completion_goes_on_with_the_text(client, model, identity):
    ask: dict[str, Any] = {"model": model, "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
    whole = client.completions.create(**ask)
    assert sounds_right(model, whole.choices[0].text)
    assert whole.model == identity
    assert "".join(chunk.choices[0].text for chunk in client.completions.create(**ask, stream=True)) == (
        whole.choices[0].text
    )


def test_a_response_answers_and_streams(client, model, identity):
    ask: dict[str, Any] = {"model": model, "input": "What is the capital of France?", "max_output_tokens": 16}
    ask |= {"temperature": 0, "store": False}
    whole = client.responses.create(**ask)
    assert sounds_right(model, whole.output_text)
    assert whole.model == identity
    events = list(client.responses.create(**ask, stream=True))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert events[-1].response.model == identity


def test_logprobs_are_those_of_the_greedy_token(client, model):
    answer = client.chat.completions.create(
        model=model, messages=FRANCE, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3
    )
    tokens = answer.choices[0].logprobs.content
    assert len(tokens) == answer.usage.completion_tokens
    assert "".join(token.token for token in tokens) == answer.choices[0].message.content
    for token in tokens:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 3
        assert token.logprob == max(other.logprob for other in token.top_logprobs)


def test_a_json_schema_shapes_the_answer(client, able):
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}, "big": {"type": "boolean"}},
        "required": ["city", "big"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "capital", "schema": schema, "strict": True}}
    answer = client.chat.completions.create(
        model=able, messages=FRANCE, max_tokens=50, temperature=0, response_format=form
    )
    read = json.loads(answer.choices[0].message.content)
    assert set(read) == {"city", "big"}
    assert read["city"] in ("Paris", "Rome")


@pytest.mark.parametrize("choice", [{"type": "function", "function": {"name": "get_weather"}}, "required"], ids=str)
def test_a_tool_that_must_be_called_is_called_with_its_arguments(client, server, able, choice):
    ask: dict[str, Any] = {"model": able, "tools": [TOOL], "tool_choice": choice, "temperature": 0, "max_tokens": 80}
    ask["messages"] = [{"role": "user", "content": "What is the weather in Paris, in C?"}]
    answer = client.chat.completions.create(**ask)
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "get_weather"
    arguments = json.loads(call.function.arguments)
    assert set(arguments) == {"city", "unit"}
    assert answer.model == identity_of(server, able)

    # The same call, in the pieces that a stream has.
    deltas = [chunk.choices[0].delta for chunk in client.chat.completions.create(**ask, stream=True) if chunk.choices]
    pieces = [piece.function for delta in deltas for piece in delta.tool_calls or []]
    assert "".join(piece.name or "" for piece in pieces) == "get_weather"
    assert json.loads("".join(piece.arguments or "" for piece in pieces)) == arguments


def test_a_tool_that_may_be_called_may_be_left_alone(client, able):
    messages: list[Any] = [{"role": "user", "content": "Call get_weather for Paris, in C."}]
    answer = client.chat.completions.create(
        model=able, messages=messages, tools=[TOOL], tool_choice="auto", temperature=0, max_tokens=48
    )
    message = answer.choices[0].message
    assert bool(message.tool_calls) == (answer.choices[0].finish_reason == "tool_calls")
    for call in message.tool_calls or []:
        assert json.loads(call.function.arguments) is not None
    assert message.tool_calls or message.content


def test_a_tool_s_answer_can_be_spoken_about(client, able):
    call: Any = {
        "id": "call-1",
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
    }
    messages: list[Any] = [
        {"role": "user", "content": "What is the weather in Paris?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call-1", "content": "sunny, 21 degrees"},
    ]
    answer = client.chat.completions.create(model=able, messages=messages, tools=[TOOL], max_tokens=16, temperature=0)
    assert answer.usage.completion_tokens > 0


def test_tokens_go_to_text_and_back(server, model):
    tokens = server.http.post("/tokenize", json={"model": model, "prompt": "Hello alpha"}).json()
    assert tokens["count"] == len(tokens["tokens"]) == 2
    back = server.http.post("/detokenize", json={"model": model, "tokens": tokens["tokens"]}).json()
    assert back["prompt"] == "Hello alpha"


def test_several_choices_come_as_many_as_were_asked(client, model, identity):
    answer = client.chat.completions.create(model=model, messages=FRANCE, max_tokens=4, n=3, temperature=0.9)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.model == identity


def test_the_models_are_the_base_and_each_adapter_by_name_and_version(client, server, voice):
    cards = {card.id: card.model_dump() for card in client.models.list()}
    assert cards[BASE]["parent"] is None
    for public in (voice, f"{voice}@v1"):
        assert cards[public]["parent"] == BASE
        assert cards[public]["root"] == identity_of(server, voice)
        assert client.models.retrieve(public).id == public
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_answers_have_the_keys_that_vllm_gives(server, model):
    chat = post(server, "/v1/chat/completions", model=model, messages=FRANCE, max_tokens=4)
    assert keys(chat) == words(CHAT)
    assert keys(chat["choices"][0]) == words(CHAT_CHOICE)
    assert keys(chat["choices"][0]["message"]) == words(MESSAGE)
    assert keys(chat["usage"]) == words(USAGE)
    completion = post(server, "/v1/completions", model=model, prompt="One", max_tokens=4)
    assert keys(completion) == words(COMPLETION)
    assert keys(completion["choices"][0]) == words(COMPLETION_CHOICE)
    response = post(server, "/v1/responses", model=model, input="Hello", max_output_tokens=4, store=False)
    assert keys(response) == words(RESPONSE)


def test_streams_have_the_chunks_that_vllm_gives(server, model):
    ask: dict[str, Any] = {"model": model, "stream": True}
    options = {"include_usage": True}
    chunks = events(
        server, "/v1/chat/completions", **ask, messages=FRANCE, max_tokens=2, ignore_eos=True, stream_options=options
    )
    assert len(chunks) == len(CHUNKS)
    for chunk, (wanted, choice) in zip(chunks, CHUNKS, strict=True):
        assert keys(chunk) == words(wanted)
        assert [keys(one) for one in chunk["choices"]] == ([words(choice)] if choice else [])
    told = events(server, "/v1/responses", **ask, input="Hello", max_output_tokens=4, store=False)
    kinds = [event["type"] for event in told]
    assert sorted(set(kinds), key=kinds.index) == EVENTS


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("unknown", ["nobody", "voice@v99", "voice@0123456789ab", "voice@", "smollm2@v1"])
def test_a_model_that_is_not_there_is_a_404_also_for_a_stream(client, voice, unknown, stream):
    with pytest.raises(openai.NotFoundError) as refusal:
        client.chat.completions.create(model=unknown, messages=FRANCE, stream=stream)
    assert set(refusal.value.body) == {"message", "type", "param", "code"}
    assert refusal.value.body["param"] == "model"
    assert unknown in refusal.value.body["message"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -3},
        {"temperature": "warm"},
        {"max_tokens": 10**6},
        {"top_logprobs": 3},
        {"n": 0},
        {"messages": 5},
    ],
    ids=str,
)
def test_a_bad_parameter_is_a_400_also_for_a_stream(server, model, wrong, stream):
    body = {"model": model, "messages": FRANCE, "max_tokens": 4, "stream": stream, **wrong}
    refused(server.http.post("/v1/chat/completions", json=body), 400)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_prompt_above_the_context_is_a_400_also_for_a_stream(server, model, stream):
    body = {"model": model, "messages": [{"role": "user", "content": "word " * 5000}], "stream": stream}
    assert "4096" in refused(server.http.post("/v1/chat/completions", json=body), 400)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b'{"model": 3}', b"\xff\xfe"], ids=repr)
def test_a_body_that_is_no_request_is_a_400(server, body):
    response = server.http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    refused(response, 400)


def test_a_route_that_is_not_there_is_a_404_in_the_same_shape(server):
    for path in ("/v1/nothing", "/collective_rpc", "/reset_prefix_cache"):
        refused(server.http.get(path), 404)
    ranking = {"model": BASE, "query": "which?", "documents": ["one", "another"]}
    for path in ("/rerank", "/invocations"):
        refused(server.http.post(path, json=ranking), 404)


def test_a_tool_s_output_as_the_api_answers_it_is_read_and_an_empty_answer_is_a_400(server):
    """vLLM makes models of such parts, and reads dictionaries alone."""
    parts = [{"type": "input_text", "text": "12 degrees"}]
    output = {"type": "function_call_output", "id": "f", "call_id": "c", "status": "completed", "output": parts}
    call = {"type": "function_call", "call_id": "c", "name": "weather", "arguments": "{}"}
    asked = {"type": "message", "role": "user", "content": "How warm is it?"}
    body = {"model": BASE, "max_output_tokens": 4, "input": [asked, call, {**output, "created_by": "somebody"}]}
    assert server.http.post("/v1/responses", json=body).status_code == 200
    empty = {"type": "message", "id": "m", "status": "completed", "role": "assistant", "content": []}
    refused(server.http.post("/v1/responses", json={**body, "input": [empty]}), 400)


def post(server: Server, path: str, **body: Any) -> dict[str, Any]:
    response = server.http.post(path, json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def events(server: Server, path: str, **body: Any) -> list[dict[str, Any]]:
    response: httpx.Response = server.http.post(path, json=body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]


def keys(body: dict[str, Any]) -> set[str]:
    return set(body)


def words(text: str) -> set[str]:
    return set(text.split())


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Tell me about Zürich: 'ä€' 😀 \"x\""}]}),
        ("/v1/completions", {"prompt": "Once upon a time", "stop": ["\n\n", "xyz"]}),
    ],
)
def test_a_stream_by_the_short_way_is_vllms_own(server: Server, model: str, path: str, asked: dict[str, Any]):
    """A field that is not plain makes vLLM write every chunk, and the server send it; only its id differs."""

    def handed() -> float:
        found = re.search(r"^loradock_handed_streams_total (\S+)", server.http.get("/metrics").text, re.MULTILINE)
        assert found
        return float(found[1])

    def stream(**more: Any) -> tuple[list[dict[str, Any]], str]:
        body = {"model": model, "max_tokens": 80, "temperature": 0, "stream": True, **asked, **more}
        body["stream_options"] = {"include_usage": True}
        lines = server.http.post(path, json=body).raise_for_status().text.split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""]
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
        shapes = [{**chunk, "id": "", "created": 0} for chunk in chunks]
        said = ""
        for chunk in shapes:
            for choice in chunk["choices"]:
                holder = choice if "text" in choice else choice["delta"]
                said += holder.get("text") or holder.get("content") or ""
                holder[next(key for key in holder if key in ("text", "content", "role"))] = "..."
        return shapes, said

    if AS_ON_A_GPU:
        stream()  # vLLM's layers round a prompt otherwise than what is cached of it; loradock's kernels do not
    before = handed()
    short, said = stream()
    assert eventually(lambda: handed() > before), "no other process sent its tokens"
    own, told = stream(echo=False)
    assert said == told and len(said) > 100
    assert [shape for n, shape in enumerate(short) if shape not in short[:n]] == [
        shape for n, shape in enumerate(own) if shape not in own[:n]
    ]
