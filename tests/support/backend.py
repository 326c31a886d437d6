"""A backend without vLLM: it answers with the model's name."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from serve.asgi.exchange import Generation, watching
from serve.errors import AdapterRejected, ConfigError, Conflict, LoradockError

# Fields that say how to answer.
UNREAD = (
    "model",
    "priority",
    "cache_salt",
    "request_id",
    "stream",
    "stream_options",
    "store",
    "background",
    "max_tokens",
    "previous_response_id",
)


class FakeTokens:
    """A tokenizer of two control tokens, and an embedding of 32 rows."""

    vocabulary = 32
    control_tokens = frozenset({"<|im_end|>", "<|im_start|>"})

    def token_number(self, token: str) -> int | None:
        return {"<|im_start|>": 0, "<|im_end|>": 1}.get(token)


@dataclass
class FakeSequence:
    generation: Generation

    def read(self) -> Generation:
        return self.generation


class FakeBackend:
    """Stands at the edge for vLLM: answers with the model's name, holds what it is told to hold."""

    name = "base"
    version = "fake"
    model = "model"
    max_lora_rank = 16
    max_resident = 4
    slots = 2
    seats = 64
    ranks = 1
    prioritizes = True
    max_model_len = 128
    weights = "bfloat16; output layer bfloat16"
    keeps_responses = True
    patches: Mapping[str, str] = MappingProxyType({"media": "", "titles": "vllm_patches leaves it out"})

    def __init__(self, model: str | None = None) -> None:
        self.model = model or self.model
        # Those that came after this one, and what is to be done to each before it starts.
        self.heirs: list[FakeBackend] = []
        self.prepare: Callable[[FakeBackend], None] = lambda heir: None
        self.starts = self.stops = self.waiting = self.memory = 0
        self.cause = "it was told to die"
        self.stalled = 0.0
        self.wont_start: str | None = None
        self.no_room = False
        self.held: dict[str, int] = {}
        self.numbers: list[int] = []
        self.loads = 0
        self.touched: list[str] = []
        self.dead = False
        self.running = self.background = 0
        self.refuse: str | None = None
        # Models whose answers crash, or never come.
        self.broken: str | None = None
        self.slow: str | None = None
        # How far an adapter moves the log-probabilities, by the name in its id; the first match.
        self.effects: dict[str, float] = {}
        self.probes: list[str | None] = []
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        # The headers that came with each of them.
        self.headers: list[dict[str, str]] = []
        self.usage: dict[str, int] | None = None
        # What the engine made of each request.
        self.generation = Generation([1, 2, 3], [4, 5], "stop", queue=0.01, gap=0.02, worst_gap=0.03)
        # What it stored, by the response's id.
        self.responses: dict[str, str] = {}
        # Tokens that it computed, whoever asked and whether or not anybody watched.
        self.computed = 0
        self.generate: Callable[[dict[str, Any]], Generation] | None = None
        # What an answer says, a stream word by word if it has a prompt; without it an answer has no choices.
        self.say: Callable[[dict[str, Any]], str] | None = None
        # Of a text that is classified, what the labels' probabilities are.
        self.classify: Callable[[str], list[float]] | None = None
        # Cleared, a stream stops after its first chunk until this is set.
        self.flow = asyncio.Event()
        self.flow.set()

    async def start(self) -> None:
        self.starts += 1
        if self.wont_start:
            raise ConfigError(self.wont_start)

    async def stop(self, *, kill: bool = False) -> None:
        self.stops += 1
        self.held.clear()

    def check_room(self) -> None:
        if self.no_room:
            raise Conflict("there is no room")

    def another(self, model: str | None = None) -> FakeBackend:
        heir = FakeBackend(model or self.model)
        heir.name, heir.prepare = self.name, self.prepare
        self.heirs.append(heir)
        self.prepare(heir)
        return heir

    async def log_stats(self) -> None: ...

    async def add(self, adapter_id: str, number: int, path: Path) -> None:
        self.loads += 1
        await asyncio.sleep(0.01)
        if self.refuse:
            raise AdapterRejected(self.refuse)
        assert (path / "adapter_model.safetensors").exists()
        assert number not in self.numbers, "a number was used twice"
        self.numbers.append(number)
        self.held[adapter_id] = number

    async def touch(self, adapter_id: str) -> None:
        self.touched.append(adapter_id)

    async def remove(self, adapter_id: str) -> None:
        self.held.pop(adapter_id, None)

    async def resident(self) -> set[int]:
        return set(self.held.values())

    async def probe(self, adapter_id: str | None, prompts: Sequence[str]) -> list[dict[int, float]]:
        assert adapter_id is None or adapter_id in self.held
        self.probes.append(adapter_id)
        for _ in prompts:
            self._make(Generation([1, 2, 3], [4], "length"))
        return [{token: self._effect(adapter_id) - token for token in range(20)} for _ in prompts]

    async def score(self, adapter_id: str | None, text: str) -> float:
        self._make(Generation([1] * 40, [2], "length"))
        return -2.0 - self._effect(adapter_id)

    def _make(self, made: Generation) -> None:
        self.computed += len(made.prompt) + len(made.output)
        if watch := watching.get():
            watch.sequences.append(FakeSequence(made))

    def _effect(self, adapter_id: str | None) -> float:
        if adapter_id is None:
            return 0.0
        return self.effects.get(adapter_id.partition("@")[0], 0.5)

    def metrics(self, names: Collection[str] = ()) -> list[Metric]:
        return [family for family in self._metrics() if not names or family.name in names]

    def _metrics(self) -> list[Metric]:
        tokens = CounterMetricFamily("vllm:tokens", "Tokens.", labels=("model",))
        tokens.add_metric((self.name,), 1)
        running = GaugeMetricFamily("vllm:lora_requests_info", "Running.", labels=("running",))
        running.add_metric(("a,b",), 1)
        return [tokens, running]

    def busy_seconds(self) -> dict[str, float]:
        return {"clients": 2.0, "background": 0.5}

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        body = await request.json() if scope["method"] == "POST" else {}
        if refusal := self.stopped(body):
            await refusal(scope, receive, send)
            return
        self.bodies.append(body)
        self.paths.append(scope["path"])
        self.headers.append(dict(request.headers))
        if scope["method"] == "POST":
            self._make(self.generate(body) if self.generate else self.generation)
        if body.get("model") and body["model"] == self.broken:
            raise RuntimeError("broken")
        if body.get("model") and body["model"] == self.slow:
            await asyncio.Event().wait()
        await self._answer(body)(scope, receive, send)

    def stopped(self, body: dict[str, Any]) -> Response | None:
        """What the gate of this request says of its prompts, where one must not begin."""
        if (watch := watching.get()) and watch.gate:
            try:
                for prompt in self.rendered(body):
                    watch.gate(prompt)
            except LoradockError as error:
                return JSONResponse(error.body(), status_code=error.status)
        return None

    tokens = FakeTokens()

    def rendered(self, body: dict[str, Any]) -> list[list[int] | None]:
        """Its prompts, a character a token: whatever is in the body and says nothing of how to answer."""
        if body.get("prompt_embeds"):
            return [None]
        said = {name: value for name, value in sorted(body.items()) if name not in UNREAD}
        earlier = self.responses.get(str(body.get("previous_response_id")), "")
        return [[ord(letter) for letter in json.dumps(said, ensure_ascii=False) + earlier]]

    def text_of(self, tokens: Sequence[int]) -> str:
        return "".join(map(chr, tokens))

    def _answer(self, body: dict[str, Any]) -> Response:
        model = body.get("model")
        assert model in (None, self.name) or model in self.held, f"{model} is not in the engine"
        if body.get("fail"):
            return StreamingResponse(self._failing(), media_type="text/event-stream")
        if body.get("stream"):
            counted = (body.get("stream_options") or {}).get("include_usage", False)
            text = self.say(body) if self.say and ("messages" in body or "prompt" in body) else ""
            return StreamingResponse(self._stream(model, counted, text), media_type="text/event-stream")
        answer = {"model": model} if self.usage is None else {"model": model, "usage": self.usage}
        if self.classify and "input" in body:
            answer["data"] = [{"probs": self.classify(body["input"])}]
        elif self.say:
            text = self.say(body)
            answer["choices"] = [{"text": text} if "prompt" in body else {"message": {"content": text}}]
        return JSONResponse(answer)

    async def _stream(self, model: str | None, counted: bool, text: str = "") -> AsyncIterator[str]:
        self.running += 1
        try:
            yield f"data: {json.dumps({'model': model})}\n\n"
            await self.flow.wait()
            for word in text.split(" ") if text else ():
                yield f"data: {json.dumps({'model': model, 'choices': [{'delta': {'content': word + ' '}}]})}\n\n"
            yield f"data: {json.dumps({'model': model})}\n\n"
            if counted:
                yield f"data: {json.dumps({'model': model, 'usage': self.usage})}\n\n"
            yield "data: [DONE]\n\n"
        finally:
            self.running -= 1

    async def _failing(self) -> AsyncIterator[str]:
        error = {"message": "too long", "type": "BadRequestError", "param": None, "code": 400}
        yield f"data: {json.dumps({'error': error})}\n\n"
        yield "data: [DONE]\n\n"
