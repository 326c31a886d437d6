"""An inference request: read from the socket, checked, and rewritten for the engine that answers it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from starlette.datastructures import Headers
from starlette.types import Receive, Scope

from serve.adapters.mixing.mixture import listed, parse
from serve.asgi.json_weight import decoded
from serve.asgi.request_body import replayed
from serve.engine.engine import LOW_PRIORITY
from serve.errors import BadRequest, MethodNotAllowed, NotFound
from serve.gateway.fan_out import GENERATE
from serve.gateway.router import Route
from serve.gateway.tenant_isolation import check_response_owner, new_response_id, tenant_salt
from serve.names import shown

# What a client may reach of vLLM's app; its admin, lora and debugging routes stay unreachable.
PATHS = re.compile(
    r"/v1/(chat/completions(/batch)?|completions|responses|messages(/count_tokens)?|embeddings|score|rerank|classify)"
    r"|/(tokenize|detokenize|pooling|classify|score|rerank|v2/rerank)"
    r"|/inference/v1/generate|/invocations"
)
# What vLLM calls without a version, beside the routes that have one.
CLASSIFY = "/classify"
RENAMED = {f"/v1{CLASSIFY}": CLASSIFY}
# SageMaker's one route for all: the first field that a body has says which other route it means, as in vLLM.
INVOCATIONS = "/invocations"
INVOKED = {
    "messages": "/v1/chat/completions",
    "prompt": "/v1/completions",
    "documents": "/rerank",
    "input": "/v1/embeddings",
}
_ADAPTER_HEADER = "x-amzn-sagemaker-adapter-identifier"
RESPONSES = "/v1/responses"
STORED = re.compile(r"/v1/responses/(?P<id>[^/]+)(?P<cancel>/cancel)?")
# Those that generate nothing, know no cache_salt, and fill no cache.
COUNTS_TOKENS = re.compile(r"/(de)?tokenize|/v1/messages/count_tokens")
_TOKENIZES = re.compile(r"/(de)?tokenize")
# Those whose body knows no priority.
_WITHOUT_PRIORITY = re.compile(r"/(de)?tokenize|/v1/messages(/count_tokens)?")
# vLLM's headers for the data-parallel rank that is to answer, and for the place in the engine's queue. They are this
# server's to set; a client's are dropped.
RANK = b"x-data-parallel-rank"
PRIORITY = b"x-vllm-priority"
# What other servers read as "answer with this adapter". Nothing here does: without a word the base would answer.
FOREIGN_MODEL_FIELDS = (
    *("adapter", "adapter_id", "adapter_name", "adapter_source", "merged_adapters"),  # LoRAX
    *("lora", "lora_id", "lora_name", "lora_path", "lora_request", "loras"),  # llama.cpp, SGLang, TensorRT-LLM
    "engine",  # OpenAI's older API
)
# What comes with token ids elsewhere. The first two would fill caches under hashes that the client chooses, the others
# belong to deployments whose prompts are computed on another machine.
_NOT_TOKENS = ("features", "content_parts", "kv_transfer_params", "ec_transfer_params")
NOTHING_KEPT = (
    "this server keeps no responses, so `previous_response_id` finds none: send the conversation in `input`, or have "
    "an operator start the server with VLLM_ENABLE_RESPONSES_API_STORE=1 (it keeps the last 1,000 in memory, by tenant)"
)
NO_CONVERSATIONS = (
    "this server keeps no conversations: send what was said before in `input`, or name the response before in "
    "`previous_response_id`"
)
# OpenRouter's: names in the order in which they are tried.
MAX_MODELS = 8
# Fields of a body that are this server's, and no engine's.
_OURS = ("priority", "models", "adapters")
# Fields that say how to answer, and nothing of what is read.
_ANSWERING = (*_OURS, "stream", "stream_options", "background", "store", "request_id", "cache_salt")
_FRAMING = (b"content-length", b"transfer-encoding")
_LOOKED_INTO = {
    "structured_outputs": (dict, "an object such as {'regex': '...'}"),
    "messages": (list, "a list of messages"),
    "tools": (list, "a list of tools"),
}
# Each of them is compared with tens of models, one after the other; as many messages as OpenAI takes.
_ITEMS, MAX_ITEMS = ("messages", "input", "tools"), 2048
# Longer than any prompt that a text model has room for; images and sound come inside the body too.
TEXT_BYTES = 4 << 20
MEDIA_BYTES = 64 << 20
# These compute nothing, and take time and memory for each byte.
TOKENIZE_BYTES = 1 << 20
MAX_TIMEOUT = 86_400
# The engine is told numbers in 64 bits. A body without so many digits in a row has none that are longer.
_LONG_NUMBER = re.compile(rb"[0-9]{19}")
_INTEGERS = range(-(1 << 63), 1 << 63)

# msgspec takes 10 microseconds for 1e308, Python half of one.
_FAR_EXPONENT = re.compile(rb"[0-9][eE][+-]?[0-9]{2}")


def _finite(text: str) -> float:
    if math.isinf(number := float(text)):
        raise ValueError(f"the number {shown(text, 40)} is out of range")
    return number


_decode = msgspec.json.Decoder(dict[str, Any]).decode
_decode_far = msgspec.json.Decoder(dict[str, Any], float_hook=_finite).decode
_encode = msgspec.json.Encoder().encode


class InferenceRequest:
    """A JSON request body, read whole."""

    __slots__ = ("body", "fallbacks", "fields", "model")

    def __init__(self, body: bytes) -> None:
        self.body = body
        try:
            self.fields = decoded(body, _decode_far if _FAR_EXPONENT.search(body) else _decode)
        except msgspec.DecodeError as error:
            raise BadRequest(f"the request body is not a JSON object: {error}") from error
        _check_priority(self.fields.get("priority"))
        if _LONG_NUMBER.search(body):
            _check_integers(self.fields)
        _check_kinds(self.fields)
        self.model, self.fallbacks = _model_names(self.fields)

    def check(self, path: str) -> None:
        """BadRequest, if it holds what this route does not take."""
        if path == RESPONSES and self.fields.get("conversation") is not None:  # it would be answered without it
            raise BadRequest(NO_CONVERSATIONS, param="conversation")
        if path != GENERATE:
            return
        sampling = self.fields.get("sampling_params")
        if sampling is not None and not isinstance(sampling, dict):
            raise BadRequest(
                f"sampling_params takes an object such as {{'max_tokens': 16}}, not {shown(sampling, 40)}",
                param="sampling_params",
            )
        held = [name for name in _NOT_TOKENS if self.fields.get(name) is not None]
        if sampling and sampling.get("extra_args") is not None:
            held.append("extra_args")
        if held:
            raise BadRequest(f"{held[0]} is not taken: {path} takes token_ids and sampling_params", param=held[0])

    def invoked(self, headers: Headers) -> str:
        """The route that a body of /invocations means; the model is the adapter that SageMaker's header names."""
        if adapter := headers.get(_ADAPTER_HEADER):
            self.model, self.fallbacks = adapter, ()
        for field, path in INVOKED.items():
            if field in self.fields:
                return path
        raise BadRequest(f"/invocations takes a body with one of {', '.join(INVOKED)}: what to answer is told by that")

    def settle(self, choose: Callable[[Sequence[str | None]], str | None]) -> None:
        """Of several models, take the one that `choose` says: guards, lease and answer are that one's."""
        if self.fallbacks:
            self.model, self.fallbacks = choose((self.model, *self.fallbacks)), ()

    def route_to(self, model: str) -> None:
        """Ask for this model."""
        self.model = model

    def rewritten(self, path: str, route: Route, tenant: str) -> dict[str, Any]:
        """The fields, asking for the route's model by the backend's name for it, within the caller's tenant."""
        changes: dict[str, Any] = {"model": route.model}
        if route.lease.priority and not _WITHOUT_PRIORITY.fullmatch(path):
            changes["priority"] = route.lease.priority
        salt = None if COUNTS_TOKENS.fullmatch(path) else tenant_salt(self.fields.get("cache_salt"), tenant)
        if salt is not None:
            changes["cache_salt"] = salt
        if path == RESPONSES:
            previous = self.fields.get("previous_response_id")
            if isinstance(previous, str):
                if not route.engine.backend.keeps_responses:
                    raise NotFound(NOTHING_KEPT, param="previous_response_id")
                check_response_owner(previous, tenant)
            changes["request_id"] = new_response_id(tenant)
        own = {name: value for name, value in self.fields.items() if name not in _OURS}
        fields = {**own, **changes}
        return self.fields if fields == self.fields else fields

    def unanswered(self, path: str, base: str, tenant: str) -> dict[str, Any]:
        """The fields with the base model's name, so that the engine's app renders what any adapter of it would read."""
        previous = self.fields.get("previous_response_id")
        if path == RESPONSES and isinstance(previous, str):
            check_response_owner(previous, tenant)
        fields = {name: value for name, value in self.fields.items() if name not in _ANSWERING}
        return {**fields, "model": base} | ({"store": False} if path == RESPONSES else {})

    def replay(self, scope: Scope, receive: Receive, fields: dict[str, Any]) -> tuple[Scope, Receive]:
        """The same request with these fields."""
        body = self.body
        if fields is not self.fields:
            body = _encode(fields)
            headers = [header for header in scope["headers"] if header[0] not in _FRAMING]
            scope = {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}
        return scope, replayed(body, receive)


def for_engine(scope: Scope, route: Route) -> Scope:
    """The request with the route's headers for vLLM, and none of the client's own."""
    headers = [header for header in scope["headers"] if header[0] not in (RANK, PRIORITY)]
    if route.lease.rank is not None:
        headers.append((RANK, str(route.lease.rank).encode()))
    if route.lease.priority and scope["path"] == "/v1/messages":
        headers.append((PRIORITY, str(route.lease.priority).encode()))
    return {**scope, "headers": headers}


def _check_priority(priority: Any) -> None:
    """BadRequest, if it is neither absent nor a whole number in range; vLLM would take "-5" and -9.0 for numbers."""
    if priority is None or (type(priority) is int and 0 <= priority < LOW_PRIORITY):
        return
    raise BadRequest(
        f"priority takes a whole number from 0 to {LOW_PRIORITY - 1}, not {shown(priority, 40)}: "
        "0 is a client's turn, more waits longer",
        param="priority",
    )


def _check_integers(fields: dict[str, Any]) -> None:
    """BadRequest for an integer, at any depth, that does not fit into 64 bits: it could not be sent to the engine."""
    for field, value in fields.items():
        pending = [value]
        while pending:
            item = pending.pop()
            if isinstance(item, dict):
                pending.extend(item.values())
            elif isinstance(item, list):
                pending.extend(item)
            elif type(item) is int and item not in _INTEGERS:
                raise BadRequest(
                    f"{field} holds the number {shown(item, 40)}; numbers here have at most 64 bits", param=field
                )


def _check_kinds(fields: dict[str, Any]) -> None:
    """BadRequest for what vLLM looks into before it asks what it is, which was a 500."""
    for field, (kind, what) in _LOOKED_INTO.items():
        value = fields.get(field)
        # A chat's `messages` may be absent, not null; /tokenize takes null beside a prompt.
        is_none = value is None and (field != "messages" or field not in fields or "prompt" in fields)
        if not is_none and not isinstance(value, kind):
            raise BadRequest(f"{field} takes {what}, not {shown(value, 40)}", param=field)
    for field in _ITEMS:
        items = fields.get(field)
        # Texts and lists of token ids, the inputs of embeddings, have a bound of their own.
        if isinstance(items, list) and len(items) > MAX_ITEMS and not isinstance(items[0], str | int | list):
            raise BadRequest(f"{field} holds {len(items)} items, and {MAX_ITEMS} are the most", param=field)
    for number, tool in enumerate(fields.get("tools") or ()):
        if isinstance(tool, dict):
            _check_properties(tool, f"tools.{number}")


def _check_properties(tool: dict[str, Any], field: str) -> None:
    """BadRequest for parameters of a tool that a chat template looks into and cannot read."""
    if isinstance(function := tool.get("function"), dict):
        tool, field = function, f"{field}.function"
    for name in ("parameters", "input_schema"):
        schema = tool.get(name)
        properties = schema.get("properties") if isinstance(schema, dict) else None
        if properties is not None and not isinstance(properties, dict):
            field = f"{field}.{name}.properties"
            raise BadRequest(f"{field} takes an object of schemas by name, not {shown(properties, 40)}", param=field)


def _model_names(fields: dict[str, Any]) -> tuple[str | None, tuple[str, ...]]:
    """The model that the request names, and those that may answer in its place.

    BadRequest, if it names one in a way that nobody here reads.
    """
    for field in FOREIGN_MODEL_FIELDS:
        if fields.get(field) is not None:
            raise BadRequest(
                f"`{field}` chooses no model here, so the answer would be another model's than you asked for: "
                "send the adapter's name as `model` (GET /v1/models lists the names)",
                param=field,
            )
    model = fields.get("model")
    if model is not None and not isinstance(model, str):
        raise BadRequest("model takes a string: GET /v1/models lists the names", param="model")
    models = fields.get("models")
    if (adapters := fields.get("adapters")) is not None:
        return _mixture_name(listed(adapters), model, models), ()
    if models is None:
        return model or None, ()
    names = models if isinstance(models, list) else []
    if not 1 <= len(names) <= MAX_MODELS or not all(isinstance(name, str) and name for name in names):
        raise BadRequest(
            f"models takes a list of 1 to {MAX_MODELS} names, tried in this order, not {shown(models, 80)}",
            param="models",
        )
    first, *fallbacks = dict.fromkeys([model, *names] if model else names)
    return first, tuple(fallbacks)


def _mixture_name(name: str, model: str | None, models: Any) -> str:
    """The mixture that `adapters` lists; BadRequest, if the request names another model as well."""
    if models is not None:
        raise BadRequest(
            "send `adapters` or `models`: the one says who answers together, the other who may", param="models"
        )
    if model and sorted(parse(model)) != sorted(parse(name)):
        raise BadRequest(
            f"model is `{shown(model, 80)}`, and adapters are `{shown(name, 160)}`: send one of them, or both alike",
            param="adapters",
        )
    return name


def body_limit(path: str, media: bool) -> int:
    """Bytes that the body of this request may have."""
    return TOKENIZE_BYTES if _TOKENIZES.fullmatch(path) else MEDIA_BYTES if media else TEXT_BYTES


def stored_response(method: str, path: str) -> str | None:
    """The id of the stored response that a path names; None for a path that asks.

    NotFound for any other path, MethodNotAllowed for any other method.
    """
    stored = STORED.fullmatch(path)
    if not stored and not PATHS.fullmatch(path):
        raise NotFound(f"there is nothing at {path}: see /v1/models and the README for what there is")
    takes = "GET" if stored and not stored["cancel"] else "POST"
    if method != takes:
        raise MethodNotAllowed(f"{path} takes {takes}, not {method}", allow=takes)
    return stored["id"] if stored else None


def requested_timeout(headers: Headers) -> float | None:
    """The client's X-Request-Timeout in seconds."""
    header = headers.get("x-request-timeout")
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= MAX_TIMEOUT:
        raise BadRequest(f"X-Request-Timeout takes seconds above 0 and up to {MAX_TIMEOUT}, not {header[:40]!r}")
    return seconds
