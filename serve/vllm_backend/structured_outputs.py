"""Schemas, grammars, choices and patterns that an answer has to follow: bounded, and compiled in a process that can be
ended, before vLLM sees them.

vLLM looks at them on the event loop of the server, and compiles them in a thread of the engine that goes on when its
client has left, one after the other. What arrives there from here was compiled within the time limit already.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from contextvars import ContextVar
from copy import copy
from multiprocessing.connection import Connection
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.async_llm import AsyncLLM

from serve.vllm_backend.compiler_process import CompilerProcess
from serve.vllm_backend.grammar_backends import is_beyond_xgrammar

MAX_BYTES = 128 << 10  # of a schema, grammar, pattern or of all choices
MAX_NODES = 10_000  # values in a schema: objects, lists, texts, numbers
MAX_DEPTH = 64  # of objects and lists in one another, vLLM's own limit
TAG_DEPTH = 80  # the same for structural tags, which wrap schemas
MAX_CHOICES = 2_000
SECONDS = 5.0  # to compile one
START_SECONDS = 300.0  # until the process that compiles is there
REMEMBERED = 256  # that were compiled and are not compiled again

FORBIDDING = ("allowed_token_ids", "bad_words", "min_tokens")

# Before what xgrammar says: when, and where in its own code.
_SOURCE = re.compile(r"^\[[\d:]+\] \S+:\d+: ")

# What this request's grammar became when it was compiled.
_compiled: ContextVar[Any] = ContextVar("compiled", default=None)


def validate_structured_outputs(original: Callable[..., None], params: Any, *config: Any) -> None:
    """vLLM's, but of what was validated and compiled already."""
    if params.structured_outputs is None or params.structured_outputs is not _compiled.get():
        original(params, *config)


class Engine(AsyncLLM):
    """vLLM's, which takes no grammar that was not compiled in time."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        self.grammars = Grammars(compile_grammars, vllm_config)
        super().__init__(vllm_config, *args, **kwargs)

    async def add_request(self, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(params, "structured_outputs", None) is not None:
            params = copy(params)
            params.structured_outputs = await self.grammars.compiled(params.structured_outputs)
            _compiled.set(params.structured_outputs)
        return await super().add_request(request_id, prompt, params, *args, **kwargs)

    def generate(self, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        answers = super().generate(prompt, sampling_params, *args, **kwargs)
        return answerable(answers, sampling_params) if forbidden_by(sampling_params) else answers


def forbidden_by(params: Any) -> list[str]:
    """What may leave no token at all to an answer that follows a grammar."""
    return [name for name in FORBIDDING if params.structured_outputs is not None and getattr(params, name)]


async def answerable(answers: AsyncGenerator[Any, None], params: Any) -> AsyncGenerator[Any, None]:
    """vLLM's; VLLMValidationError, a 400, where it ends the request at a token that the grammar does not take."""
    async with aclosing(answers):
        async for answer in answers:
            if any(output.finish_reason == "error" for output in answer.outputs):
                names = forbidden_by(params)
                raise VLLMValidationError(
                    f"{' and '.join(names)} left no token that structured_outputs takes: leave one of them out",
                    parameter=names[0],
                )
            yield answer


class Grammars:
    """Compiles grammars in a process of its own, one at a time; it is ended with one that takes too long.

    `compiler(connection, *arguments)` runs there: it sends None once it is ready, and for each of vLLM's
    StructuredOutputsParams what became of it, or a sentence.
    """

    def __init__(
        self, compiler: Callable[..., None], *arguments: Any, seconds: float = SECONDS, start: float = START_SECONDS
    ) -> None:
        self._compiler = (compiler, *arguments)
        self._seconds = seconds
        self._start_seconds = start
        self._known: OrderedDict[str, Any] = OrderedDict()
        self._turn = asyncio.Lock()
        self._worker: CompilerProcess | None = None

    async def compiled(self, outputs: Any) -> Any:
        """What vLLM makes of these StructuredOutputsParams; VLLMValidationError, a 400, where it cannot."""
        check(outputs)
        key = hashlib.sha256(repr(outputs).encode(errors="surrogatepass")).hexdigest()
        if key not in self._known:
            async with self._turn:
                if key not in self._known:
                    try:
                        self._known[key] = await asyncio.to_thread(self._compile, outputs)
                    except asyncio.CancelledError:
                        self.close()  # nobody waits for it any more
                        raise
        self._known.move_to_end(key)
        known = self._known[key]
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return known

    def close(self) -> None:
        """End the process, whatever it does; the next grammar starts another one."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.process.kill()

    def _compile(self, outputs: Any) -> Any:
        worker = self._worker
        if worker is None or not worker.process.is_alive():
            worker = self._worker = CompilerProcess(*self._compiler)
            worker.wait_until_ready(self._start_seconds)
        answer = worker.compile(outputs, self._seconds)
        if isinstance(answer, str):
            raise VLLMValidationError(answer, parameter="structured_outputs")
        return answer


def compile_grammars(connection: Connection, vllm_config: Any) -> None:
    """vLLM's own validation and compilation, as its server and its engine do them."""
    from vllm.sampling_params import SamplingParams
    from vllm.v1.structured_output import StructuredOutputManager
    from vllm.v1.structured_output.request import StructuredOutputRequest

    manager = StructuredOutputManager(vllm_config)
    connection.send(None)
    while True:
        outputs = connection.recv()
        params = SamplingParams(structured_outputs=outputs)
        request: Any = _Request(StructuredOutputRequest(outputs), params)
        try:
            params._validate_structured_outputs(
                vllm_config.model_config, vllm_config.structured_outputs_config, manager.tokenizer
            )
            _choose_library(params, manager.tokenizer)
            manager.grammar_init(request)
            _check_width(manager.backend, vllm_config.model_config.get_vocab_size())
            _check_answerable(manager.backend, request.structured_output_request._grammar.result())
        except Exception as error:  # whatever a grammar brings about is a sentence to who sent it
            connection.send(_sentence(outputs, error))
        else:
            connection.send(params.structured_outputs)


def _sentence(outputs: Any, error: Exception) -> str:
    """Why it cannot be compiled. Of a structural tag, which strict tools become, vLLM asks a second library that knows
    no such tags, and has its error; the first one's says what is wrong."""
    what = "the structured output"
    if outputs.structural_tag is not None:
        from xgrammar import Grammar

        what = "the structured output, or the parameters of a strict tool,"
        try:
            Grammar.from_structural_tag(outputs.structural_tag)
        except Exception as first:
            error = first
    words = _SOURCE.sub("", " ".join(str(error).split()))[:500] or type(error).__name__
    return f"{what} cannot be compiled: {words}"


def _choose_library(params: Any, tokenizer: Any) -> None:
    """llguidance for a schema that it knows and xgrammar would take for another, where vLLM may choose."""
    from vllm.sampling_params import _get_llg_tokenizer
    from vllm.v1.structured_output.backend_guidance import validate_guidance_grammar

    outputs = params.structured_outputs
    if outputs.json is None or not outputs._backend_was_auto or outputs._backend != "xgrammar":
        return
    if is_beyond_xgrammar(json.loads(outputs.json) if isinstance(outputs.json, str) else outputs.json):
        with suppress(ValueError):
            validate_guidance_grammar(params, tokenizer=_get_llg_tokenizer(tokenizer))
            outputs._backend = "guidance"


def _check_width(backend: Any, vocabulary: int) -> None:
    """ValueError where its masks do not fit beside the other libraries'."""
    if backend.allocate_token_bitmask(1).shape[1] != (vocabulary + 31) // 32:
        raise ValueError("the tokenizer has more tokens than the model, and xgrammar does not know all of it")


def _check_answerable(backend: Any, grammar: Any) -> None:
    """ValueError for a grammar that no answer can follow: at its first token the engine would end the request."""
    bitmask = backend.allocate_token_bitmask(1)
    grammar.fill_bitmask(bitmask, 0)
    if not bitmask.any():
        raise ValueError("no answer can follow it")


class _Request:
    """What vLLM's manager reads of a request."""

    request_id = "structured-output"

    def __init__(self, structured_output_request: Any, sampling_params: Any) -> None:
        self.structured_output_request = structured_output_request
        self.sampling_params = sampling_params


def check(outputs: Any) -> None:
    """VLLMValidationError for what is larger than anything that is meant; vLLM's StructuredOutputsParams."""
    for name in ("regex", "grammar"):
        if (text := getattr(outputs, name)) is not None:
            _check_bytes(name, text)
    if outputs.choice is not None:
        _check_choice(outputs.choice)
    for name in ("json", "structural_tag"):
        if (schema := getattr(outputs, name)) is not None:
            _check_schema(name, schema)


def _refused(name: str, words: str) -> VLLMValidationError:
    return VLLMValidationError(f"structured_outputs.{name} {words}", parameter="structured_outputs")


def _check_bytes(name: str, text: Any) -> None:
    if not isinstance(text, str):
        raise _refused(name, f"is a text, not {type(text).__name__}")
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise _refused(name, "is no Unicode: it has half of a surrogate pair") from error
    if size > MAX_BYTES:
        raise _refused(name, f"has {size} bytes; at most {MAX_BYTES} are taken")


def _check_choice(choices: Any) -> None:
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise _refused("choice", "is a list of texts")
    if len(choices) > MAX_CHOICES:
        raise _refused("choice", f"has {len(choices)} entries; at most {MAX_CHOICES} are taken")
    _check_bytes("choice", "".join(choices))


def _check_schema(name: str, schema: Any) -> None:
    if isinstance(schema, str):
        _check_bytes(name, schema)
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise _refused(name, f"is no JSON: {error}") from error
        _check_nodes(name, schema)
        return
    _check_nodes(name, schema)
    try:
        text = json.dumps(schema)
    except (TypeError, ValueError) as error:
        raise _refused(name, f"is no JSON: {error}") from error
    _check_bytes(name, text)


def _check_nodes(name: str, schema: Any) -> None:
    if not isinstance(schema, (dict, bool) if name == "json" else dict):
        raise _refused(name, f"is a JSON object, not {type(schema).__name__}")
    most = MAX_DEPTH if name == "json" else TAG_DEPTH
    nodes, ahead = 1, [(schema, 1)]
    while ahead:
        value, depth = ahead.pop()
        if not isinstance(value, (dict, list)):
            continue
        nodes += len(value)
        _check_reference(name, value)
        if depth > most:
            raise _refused(name, f"is nested more than {most} levels deep")
        if nodes > MAX_NODES:
            raise _refused(name, f"has more than {MAX_NODES} values")
        ahead += [(child, depth + 1) for child in (value.values() if isinstance(value, dict) else value)]


def _check_reference(name: str, value: dict[str, Any] | list[Any]) -> None:
    """The compiler takes anything at all where a schema refers to something else, and says so in its log alone."""
    reference = value.get("$ref") if isinstance(value, dict) else None
    if isinstance(reference, str) and reference != "#" and not reference.startswith("#/"):
        raise _refused(name, f"refers to {reference[:100]!r}: a `$ref` begins with `#/`, within the schema")
