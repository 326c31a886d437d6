"""What an answer has to follow: bounded, compiled where it can be ended, and a 400 where it cannot be."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.structured_output.request import StructuredOutputRequest

from serve.vllm_backend import structured_outputs
from serve.vllm_backend.compiler_process import CompilerProcess
from serve.vllm_backend.grammar_backends import is_beyond_xgrammar
from serve.vllm_backend.structured_outputs import MAX_BYTES, MAX_CHOICES, MAX_NODES, Grammars, check, compile_grammars
from tests.serve.vllm_backend import pretended
from tests.serve.vllm_backend.pretended import pretend

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "tags": {"type": "array", "items": {}}},
    "required": ["name"],
}


def nested(levels: int, width: int) -> dict:
    """A schema of objects in objects: the number of its leaves is `width` to the power of `levels`."""
    if levels == 0:
        return {"type": "string"}
    inner = nested(levels - 1, width)
    return {"type": "object", "properties": {f"p{number}": inner for number in range(width)}}


@pytest.mark.parametrize(
    "given",
    [
        {"json": PERSON},
        {"json": json.dumps(PERSON)},
        {
            "json": {
                "properties": {"$ref": {"type": "string"}, "a": {"$ref": "#/$defs/a"}},
                "$defs": {"a": {"$ref": "#"}},
            }
        },
        {"json": nested(5, 4)},
        {"json": {"type": "object", "properties": {f"field_{n}": PERSON for n in range(300)}}},
        {"choice": ["yes", "no"]},
        {"choice": [f"item {n}" for n in range(1000)]},
        {"regex": r"\d{4}-\d{2}-\d{2}"},
        {"grammar": 'root ::= "a" | "b"'},
        {"json_object": True},
    ],
)
def test_what_people_ask_for_passes(given):
    check(StructuredOutputsParams(**given))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"json": nested(16, 2)}, f"more than {MAX_NODES} values"),
        ({"json": {"enum": list(range(MAX_NODES))}}, f"more than {MAX_NODES} values"),
        ({"json": json.dumps({"const": "x" * MAX_BYTES})}, f"at most {MAX_BYTES} are taken"),
        ({"json": {"const": "x" * MAX_BYTES}}, f"at most {MAX_BYTES} are taken"),
        ({"json": nested(40, 1)}, "more than 64 levels deep"),
        ({"json": "[" * 100_000}, "is no JSON"),
        ({"json": "{"}, "is no JSON"),
        ({"json": "[1]"}, "is a JSON object, not list"),
        ({"json": {"items": {"$ref": "https://example.com/a.json"}}}, "refers to 'https://example.com/a.json'"),
        ({"json": '{"anyOf": [{"$ref": "a.json#/b"}]}'}, "a `\\$ref` begins with `#/`, within the schema"),
        ({"structural_tag": '{"structures": [{"schema": {"$ref": "#a"}}]}'}, "refers to '#a'"),
        ({"structural_tag": "no JSON"}, "is no JSON"),
        ({"choice": ["x"] * 100_000}, f"has 100000 entries; at most {MAX_CHOICES} are taken"),
        ({"choice": ["\ud800"]}, "no Unicode"),
        ({"regex": "a" * (MAX_BYTES + 1)}, f"has {MAX_BYTES + 1} bytes"),
        ({"grammar": "x" * (MAX_BYTES + 1)}, f"has {MAX_BYTES + 1} bytes"),
    ],
)
def test_what_nobody_means_is_refused_with_its_number_and_the_limit(given, says):
    with pytest.raises(VLLMValidationError, match=says) as caught:
        check(StructuredOutputsParams(**given))
    assert str(caught.value).startswith(f"structured_outputs.{next(iter(given))} ")


def test_what_has_another_type_is_refused_too():
    nothing = dict.fromkeys(("json", "regex", "grammar", "choice", "structural_tag"))
    for given, says in (
        ({"choice": [1, 2]}, "list of texts"),
        ({"choice": "ab"}, "list of texts"),
        ({"regex": 5}, "text"),
    ):
        with pytest.raises(VLLMValidationError, match=says):
            check(SimpleNamespace(**{**nothing, **given}))


def regex(pattern: str) -> SimpleNamespace:
    return SimpleNamespace(json=None, regex=pattern, grammar=None, choice=None, structural_tag=None)


@pytest.fixture
async def grammars():
    made = Grammars(pretend, seconds=1.0)
    yield made
    made.close()


async def test_one_that_takes_too_long_is_ended_and_the_next_one_is_compiled(grammars):
    with pytest.raises(VLLMValidationError, match="longer than 1 s to compile"):
        await grammars.compiled(regex("slow"))
    with pytest.raises(VLLMValidationError, match="ended"):
        await grammars.compiled(regex("crash"))
    with pytest.raises(VLLMValidationError, match="it is wrong"):
        await grammars.compiled(regex("wrong"))
    assert (await grammars.compiled(regex("a"))).regex == "a"


async def test_the_loop_goes_on_and_a_client_that_left_is_waited_for_by_nobody():
    grammars = Grammars(pretend, seconds=600.0)
    try:
        await grammars.compiled(regex("first"))
        process = grammars._worker.process
        left = asyncio.create_task(grammars.compiled(regex("slow")))
        waiting = asyncio.create_task(grammars.compiled(regex("next")))
        for _ in range(20):
            await asyncio.sleep(0.01)
        assert not left.done() and not waiting.done()
        left.cancel()
        assert (await asyncio.wait_for(waiting, 60)).regex == "next"
        assert not process.is_alive(), "the one that compiled for nobody has ended"
    finally:
        grammars.close()


async def test_what_was_compiled_is_not_compiled_again(grammars):
    first = await grammars.compiled(regex("a"))
    grammars.close()
    assert await grammars.compiled(regex("a")) is first
    assert grammars._worker is None


def test_vllm_does_not_validate_again_what_was_compiled():
    outputs = StructuredOutputsParams(regex="a")
    calls = []

    def original(params, *config):
        calls.append(params.structured_outputs)

    validate = structured_outputs.validate_structured_outputs
    validate(original, SamplingParams(structured_outputs=outputs), None, None, None)
    assert calls == [outputs]
    token = structured_outputs._compiled.set(outputs)
    try:
        validate(original, SimpleNamespace(structured_outputs=outputs), None, None, None)
        assert len(calls) == 1
        validate(original, SimpleNamespace(structured_outputs=StructuredOutputsParams(regex="b")), None, None, None)
        assert len(calls) == 2, "another one is"
    finally:
        structured_outputs._compiled.reset(token)


def test_every_request_passes_the_engine_that_compiles():
    taken = list(AsyncLLM.add_request.__code__.co_varnames)
    assert taken[:4] == ["self", "request_id", "prompt", "params"]


@pytest.mark.engine
async def test_vllms_own_compiler_in_the_process(tmp_path):
    from serve.models.embedded import ensure

    config = AsyncEngineArgs(model=str(ensure("smollm2")), enforce_eager=True).create_engine_config()
    grammars = Grammars(compile_grammars, config)
    try:
        for given in ({"json": PERSON}, {"regex": "[a-z]+"}, {"choice": ["yes", "no"]}, {"grammar": 'root ::= "a"'}):
            compiled = await grammars.compiled(StructuredOutputsParams(**given))
            assert compiled._backend
        malformed = [
            {"grammar": "root ::= ("},
            {"grammar": "no grammar"},
            {"grammar": "root ::= root root root"},
            {"json": {"$ref": "#"}},
            {"regex": "(["},
            {"json": {"type": "nonsense"}},
            {"json": {"$ref": "#/nowhere"}},
            {"structural_tag": "{}"},
            {"structural_tag": json.dumps({"structures": 3, "triggers": []})},
            {"json": {"type": "string", "pattern": "(["}},
        ]
        for given in malformed:
            with pytest.raises(VLLMValidationError):
                await grammars.compiled(StructuredOutputsParams(**given))
    finally:
        grammars.close()


def test_what_is_wrong_with_a_strict_tool_is_said_by_the_library_that_knows_its_tags():
    content = {"type": "json_schema", "json_schema": {"type": "object", "properties": {"a": {"type": "strin"}}}}
    tag = {"begin": "<tool_call>", "content": content, "end": "</tool_call>"}
    triggered = {"type": "triggered_tags", "triggers": ["<tool_call>"], "tags": [tag]}
    outputs = StructuredOutputsParams(structural_tag=json.dumps({"type": "structural_tag", "format": triggered}))
    assert structured_outputs._sentence(outputs, KeyError("triggers")) == (
        'the structured output, or the parameters of a strict tool, cannot be compiled: Unsupported type "strin"'
    )


PAIR = [{"type": "object", "properties": {name: {"type": "integer"}}, "required": [name]} for name in "ab"]
EITHER = {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": False}


class Asked:
    request_id = "one"

    def __init__(self, manager, config, given):
        outputs = StructuredOutputsParams(**given)
        self.sampling_params = SamplingParams(structured_outputs=outputs)
        self.structured_output_request = StructuredOutputRequest(outputs)
        validated = (config.model_config, config.structured_outputs_config, manager.tokenizer)
        self.sampling_params._validate_structured_outputs(*validated)
        structured_outputs._choose_library(self.sampling_params, manager.tokenizer)


@pytest.mark.engine
def test_a_schema_is_compiled_by_what_knows_all_of_it_whatever_came_before():
    from serve.models.embedded import ensure
    from serve.vllm_backend.patches import applying

    applying.install("all")
    config = AsyncEngineArgs(model=str(ensure("smollm2")), enforce_eager=True).create_engine_config()
    manager = StructuredOutputManager(config)

    def takes(given, text):
        asked = Asked(manager, config, given)
        manager.grammar_init(asked)
        grammar = asked.structured_output_request._grammar.result()
        ids = manager.tokenizer.encode(text, add_special_tokens=False)
        return grammar.accept_tokens("one", [*ids, manager.tokenizer.eos_token_id])

    assert takes({"json": {"type": "integer"}}, "10"), "xgrammar's, and the engine's first"
    for schema, right, wrong in (
        ({"type": "integer", "multipleOf": 7}, "14", "10"),
        ({"allOf": [{"type": "integer"}, {"minimum": 5}]}, "7", "1"),
        ({"allOf": PAIR}, '{"a": 1, "b": 2}', '{"a": 1}'),
        ({"anyOf": [{"type": "string"}], "minLength": 3}, '"abc"', '"a"'),
        ({"$ref": "#/$defs/a", "minLength": 3, "$defs": {"a": {"type": "string"}}}, '"abc"', '"a"'),
        ({"type": "integer", "enum": [1, 2], "minimum": 2}, "2", "1"),
        ({"minLength": 3}, '"abc"', '"a"'),
        ({"type": "object", **EITHER, "anyOf": [{"required": ["a"]}]}, '{"a": 1}', "{}"),
    ):
        assert takes({"json": schema}, right) and not takes({"json": schema}, wrong), schema
        assert takes({"json": json.dumps(schema)}, right) and not takes({"json": json.dumps(schema)}, wrong)
    assert takes({"grammar": 'root ::= "a" | "b"'}, "b"), "xgrammar's own language, after llguidance"
    assert takes({"json": {"type": "integer", "not": {"const": 3}}}, "4"), "what neither knows is as vLLM has it"


@pytest.mark.parametrize("schema", [PERSON, {"type": "array", "items": {"anyOf": PAIR}}, {"$ref": "#/$defs/a"}, True])
def test_what_xgrammar_knows_all_of_stays_with_it(schema):
    assert not is_beyond_xgrammar(schema)


CHOICE = StructuredOutputsParams(choice=["yes"])
FORBIDDING = [{"bad_words": ["yes"]}, {"allowed_token_ids": [5]}, {"min_tokens": 4}]


async def engine_answers(*reasons: str | None):
    for reason in reasons:
        yield SimpleNamespace(outputs=[SimpleNamespace(finish_reason=reason)])


@pytest.mark.parametrize("forbidding", FORBIDDING)
async def test_an_answer_that_no_token_is_left_to_is_its_clients_error(forbidding, monkeypatch):
    """The engine ends it with an error of its own, which was a 500."""
    engine = object.__new__(structured_outputs.Engine)
    monkeypatch.setattr(AsyncLLM, "generate", lambda *_, **__: engine_answers(None, "error"))
    params = SamplingParams(structured_outputs=CHOICE, **forbidding)
    heard = []
    with pytest.raises(VLLMValidationError, match=f"{next(iter(forbidding))} left no token"):
        async for answer in engine.generate("x", params, "id"):
            heard.append(answer)
    assert len(heard) == 1


async def test_any_other_error_of_the_engine_stays_one(monkeypatch):
    engine = object.__new__(structured_outputs.Engine)
    monkeypatch.setattr(AsyncLLM, "generate", lambda *_, **__: engine_answers("error"))
    for params in (SamplingParams(structured_outputs=CHOICE), SamplingParams(bad_words=["yes"])):
        assert len([answer async for answer in engine.generate("x", params, "id")]) == 1


def test_the_process_that_compiles_sees_no_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    worker = CompilerProcess(pretended.tell_of_gpus)
    try:
        worker.wait_until_ready(60)
        assert worker.compile("anything", 60) == [""]
    finally:
        worker.process.kill()
