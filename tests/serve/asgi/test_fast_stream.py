"""The fast stream, under a real uvicorn and vLLM's own output processor."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from contextlib import asynccontextmanager
from functools import partialmethod
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from serve.asgi.cancellation import CancellableCall
from serve.asgi.connection import BODY
from serve.asgi.fast_stream import FLOW, LONG, FastStream
from serve.server.connection import guarded
from serve.server.front_ends import FrontEnds
from tests.support.listening import listening
from tests.support.waiting import settled

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
FIRST = {
    CHAT: '{"id":"c-1","created":1,"model":"m","choices":[{"index":0,"delta":{"content":%s},"finish_reason":null}]}',
    COMPLETIONS: '{"id":"c-1","model":"\\"text\\":","choices":[{"index":0,"text":%s,"finish_reason":null}]}',
}
SAID = ["Hi", ' "there"', "\\", "\n", "ä", "€\u2028", "\U0001f600", "\x1f", '"text":"', ""]


def chunk(path: str, text: str) -> bytes:
    return f"data: {FIRST[path] % json.dumps(text, ensure_ascii=False)}\n\n".encode()


def body(of: bytes) -> dict:
    return {"type": "http.response.body", "body": of, "more_body": True}


def said(stream: bytes) -> list[str]:
    chunks = [json.loads(line[6:])["choices"][0] for line in stream.splitlines() if line.startswith(b"data: {")]
    return [one["text"] if "text" in one else one["delta"]["content"] for one in chunks]


@pytest.mark.parametrize("path", FIRST)
@pytest.mark.parametrize("first", SAID)
async def test_a_chunk_is_the_first_one_with_another_text(path, first):
    sent = []

    async def send(message):
        sent.append(message["body"])

    way = FastStream(
        send, SimpleNamespace(write_paused=False), {CHAT: b'"delta":{"content":', COMPLETIONS: b'"text":'}[path]
    )
    await way.send(body(b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'))
    assert not way.in_order
    await way.send(body(chunk(path, first)))
    assert way.in_order
    for text in SAID:
        way.write(text)
    assert said(b"".join(sent[1:])) == [first, *SAID]
    assert len({one[:20] for one in sent[1:]}) == len({one[-20:] for one in sent[1:]}) == 1


async def test_an_only_chunk_or_another_shape_teaches_nothing():
    async def send(message): ...

    way = FastStream(send, SimpleNamespace(write_paused=False), b'"text":')
    for only in (
        b'data: {"choices":[{"text":"x","finish_reason":"stop"}]}\n\n',
        b'data: {"text":3}\n\n',
        b'data: {"choices":[{"text":"x","finish_reason":null}],"usage":{"completion_tokens":1}}\n\n',
        b'"text":\n\n',
    ):
        await way.send(body(only))
        assert not way.in_order and not way.learned


@pytest.mark.parametrize(
    "fields",
    [
        {"stream": False},
        {"stream": True, "tools": [], "tool_choice": "required"},
        {"stream": True, "tools": [], "parallel_tool_calls": False},
        {"stream": True, "logprobs": True, "prompt_logprobs": 1},
        {"stream": True, "n": 2},
        {"stream": True, "prompt": ["a", "b"]},
        {"stream": True, "stream_options": {"continuous_usage_stats": True}},
        {"stream": True, "return_token_ids": True},
        {"stream": True, "something_new": 1},
    ],
)
def test_what_is_not_plain_goes_vllms_way(fields):
    scope = {"path": CHAT, "extensions": {FLOW: SimpleNamespace(write_paused=False)}}
    assert FastStream.of(scope, fields, None) is None
    assert FastStream.of(scope, {"stream": True, "messages": [], "stream_options": {"include_usage": True}}, None)
    assert FastStream.of({**scope, "path": COMPLETIONS}, {"stream": True, "logprobs": 2}, None) is None
    assert FastStream.of({"path": CHAT}, {"stream": True}, None) is None, "nobody says whether the client reads"


@pytest.mark.parametrize("past", [False, True], ids=["by messages", "past them"])
async def test_uvicorn_says_whether_the_client_reads_and_sends_without_waiting(past):
    """A client who stops reading is seen; until then every write goes out at once, in order."""
    seen = SimpleNamespace(blocked=False, ways=[])

    async def app(scope, receive, send):
        call = CancellableCall(receive, send, lambda: None)
        way = FastStream.of(scope, {"stream": True}, send, call if past else None)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await way.send(body(chunk(CHAT, "first")))
        for number in range(200_000):
            if way.blocked:
                seen.blocked = True
                break
            way.write(f" {number}")
        seen.count = number
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async with (
        listening(app, http=guarded(60), lifespan="off") as url,
        httpx.AsyncClient(timeout=60) as client,
        client.stream("POST", url + CHAT) as answer,
    ):
        got = await answer.aread()
    assert seen.blocked, "nothing was read while the app wrote"
    assert said(got) == ["first", *(f" {number}" for number in range(seen.count))]


class Body:
    """An answer's body, as a server leaves it in the scope."""

    def __init__(self):
        self.is_open = True
        self.pieces = []
        self.offers = []

    def write(self, piece):
        self.pieces.append(piece)

    def hand_over(self, cut):
        self.offers.append((len(self.pieces), cut))


async def test_pieces_go_past_the_messages_until_the_call_is_cut_or_the_client_is_gone():
    sent, answer_body, call = [], Body(), SimpleNamespace(is_cut=False)

    async def send(message):
        sent.append(message["body"])

    way = FastStream(send, SimpleNamespace(write_paused=False), b'"text":', call, answer_body)
    await way.send(body(chunk(COMPLETIONS, "a")))
    way.write("b")
    assert said(b"".join(sent)) == ["a"] and said(b"".join(answer_body.pieces)) == ["b"]
    assert answer_body.pieces[0] == sent[0].replace(b'"a"', b'"b"')
    call.is_cut = True
    way.write("c")
    assert len(sent) == len(answer_body.pieces) == 1, "nothing is sent after the cut"
    call.is_cut, answer_body.is_open = False, False
    way.write("d")
    assert said(b"".join(sent)) == ["a", "d"], "whoever sends messages knows what becomes of it"


async def test_a_long_stream_is_offered_to_another_process_and_a_short_one_is_not():
    answer_body, call = Body(), CancellableCall(None, None, None)

    async def send(message): ...

    way = FastStream(send, SimpleNamespace(write_paused=False), b'"text":', call, answer_body)
    await way.send(body(chunk(COMPLETIONS, "a")))
    for _ in range(LONG - 1):
        way.write("b")
    assert not answer_body.offers
    for _ in range(2 * LONG):
        way.write("b")
    assert answer_body.offers == [(LONG - 1, call.cut), (2 * LONG - 1, call.cut)], "again, if it had to come back"


async def test_who_has_to_see_each_piece_does():
    sent, answer_body = [], Body()

    async def send(message):
        sent.append(message["body"])

    scope = {"path": CHAT, "extensions": {FLOW: SimpleNamespace(write_paused=False), BODY: answer_body}}
    way = FastStream.of(scope, {"stream": True}, send)
    await way.send(body(chunk(CHAT, "a")))
    way.write("b")
    assert said(b"".join(sent)) == ["a", "b"] and not answer_body.pieces


def started(watch, **settings):
    """vLLM's own output processor with one request that streams and may use its fast stream."""
    pytest.importorskip("vllm")
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast
    from vllm.sampling_params import RequestOutputKind, SamplingParams
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector

    from serve.asgi.exchange import watching
    from serve.vllm_backend.output_processor import Outputs

    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(300)}, unk_token="w0"))
    words.decoder = decoders.Fuse()
    processor = OutputProcessor(PreTrainedTokenizerFast(tokenizer_object=words), log_stats=True)
    processor.__class__, processor.plain = Outputs, True
    for name, value in settings.items():
        setattr(processor, name, value)
    params = SamplingParams(max_tokens=300, output_kind=RequestOutputKind.DELTA)
    rest = dict.fromkeys(("mm_features", "pooling_params", "lora_request", "cache_salt", "data_parallel_rank"))
    request = EngineCoreRequest(
        "r-1", [1, 2], sampling_params=params, arrival_time=time.time(), external_req_id="r", **rest
    )
    queue = RequestOutputCollector(params.output_kind, "r-1")
    token = watching.set(watch)
    try:
        processor.add_request(request, None, None, 0, queue)
    finally:
        watching.reset(token)

    def step(word, last=False):
        from vllm.v1.engine import EngineCoreOutput, FinishReason
        from vllm.v1.metrics.stats import IterationStats

        output = EngineCoreOutput("r-1", [word], finish_reason=FinishReason.LENGTH if last else None)
        processor.process_outputs([output], time.monotonic(), IterationStats())

    return step, queue


async def test_vllm_gets_the_first_and_the_last_token_and_counts_them_all():
    from serve.asgi.exchange import Watch

    sent, flow = [], SimpleNamespace(write_paused=False)

    async def send(message):
        sent.append(message["body"])

    way = FastStream(send, flow, b'"text":')
    step, queue = started(Watch(fast_stream=way))
    step(5)
    first = queue.get_nowait()
    step(6)  # before the first chunk is out: it waits
    assert sent == [] and queue.get_nowait() is None
    await way.send(body(chunk(COMPLETIONS, first.outputs[0].text)))
    step(7)
    step(8)
    assert said(b"".join(sent)) == ["w5", "w6w7", "w8"] and queue.get_nowait() is None

    flow.write_paused = True  # the client does not read: vLLM's way waits for it, under the client's timeout
    step(9)
    late = queue.get_nowait()
    assert (late.outputs[0].text, list(late.outputs[0].token_ids)) == ("w9", [6, 7, 8, 9])
    step(10)
    assert queue.get_nowait() is None
    flow.write_paused = False
    await way.send(body(chunk(COMPLETIONS, late.outputs[0].text)))
    step(11)
    assert said(b"".join(sent))[-2:] == ["w9", "w10w11"]

    step(12, last=True)
    final = queue.get_nowait()
    assert (final.finished, final.outputs[0].text, list(final.outputs[0].token_ids)) == (True, "w12", [10, 11, 12])


async def test_a_stream_whose_first_chunk_teaches_nothing_goes_vllms_way():
    from serve.asgi.exchange import Watch
    from serve.vllm_backend.output_processor import PATIENCE

    async def send(message):
        raise AssertionError("nothing is to be sent by the fast stream")

    step, queue = started(Watch(fast_stream=FastStream(send, SimpleNamespace(write_paused=False), b'"text":')))
    step(1)
    texts = [queue.get_nowait().outputs[0].text]
    for number in range(2, PATIENCE + 20):
        step(number)
        if (answer := queue.get_nowait()) is not None:
            texts.append(answer.outputs[0].text)
    assert "".join(texts) == "".join(f"w{number}" for number in range(1, PATIENCE + 20))
    assert len(texts) == 19


async def test_a_stream_that_coalesces_writes_once_for_several_steps():
    from serve.asgi.exchange import Watch
    from serve.vllm_backend.coalescing import Coalescing

    sent, coalescing = [], Coalescing(3600)

    async def send(message):
        sent.append(message["body"])

    def release():
        coalescing._timer.cancel()
        coalescing._release()

    way = FastStream(send, SimpleNamespace(write_paused=False), b'"text":')
    step, answers = started(Watch(fast_stream=way), coalescing=coalescing)
    step(5)
    await way.send(body(chunk(COMPLETIONS, answers.get_nowait().outputs[0].text)))
    for word in (6, 7, 8):
        step(word)
    assert len(sent) == 1
    release()
    assert len(sent) == 2 and said(b"".join(sent)) == ["w5", "w6w7w8"]
    step(9)
    step(10, last=True)
    assert answers.get_nowait().outputs[0].text == "w9w10", "what waits goes with the end"
    release()
    assert len(sent) == 2


STORY = 'Zürich: \'ä€\' 😀 "x" \\n\n\t<tool_call> {"text": 1} und weiter; then it goes on in plain words until its end.'


class Scripted:
    """An engine's core that says the same to everybody, a token a step; the rest of vLLM is vLLM."""

    engine_ranks_managed = (0,)

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.stops = False
        self._logprobs: dict[str, int | None] = {}
        self.resources = SimpleNamespace(engine_dead=False)
        self._said: dict[str, int] = {}
        self._asked = asyncio.Event()

    async def get_supported_tasks_async(self):
        return ("generate",)

    async def add_request_async(self, request) -> None:
        self._logprobs[request.request_id] = request.sampling_params.num_logprobs
        self._said[request.request_id] = 0
        self._asked.set()

    async def abort_requests_async(self, ids) -> None:
        for id in ids:
            self._said.pop(id, None)

    async def get_output_async(self):
        from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
        from vllm.v1.outputs import LogprobsLists

        reason = FinishReason.STOP if self.stops else FinishReason.LENGTH
        while not self._said:
            self._asked.clear()
            await self._asked.wait()
        await asyncio.sleep(0.001)
        outputs = []
        for id, said in list(self._said.items()):
            last = said + 1 == len(self.tokens)
            output = EngineCoreOutput(id, [self.tokens[said]], finish_reason=reason if last else None)
            if (count := self._logprobs[id]) is not None:
                tokens = np.array([[self.tokens[said], *range(said, said + count)]])
                values = np.array([[-0.1 / (said + 1), *(-0.5 - index for index in range(count))]], dtype=np.float32)
                output.new_logprobs = LogprobsLists(tokens, values, np.array([1]))
            outputs.append(output)
            self._said[id] = said + 1
            if last:
                del self._said[id]
        return EngineCoreOutputs(outputs=outputs, timestamp=time.monotonic())

    def shutdown(self, timeout=None) -> None: ...


@pytest.fixture
def quiet_root():
    """vLLM's app sets the level of everybody's logs; the next test has its own."""
    level = logging.root.level
    yield
    logging.root.setLevel(level)


MESSAGES = {"messages": [{"role": "user", "content": "Tell me."}]}
HERMES = {"enable_auto_tool_choice": True, "tool_call_parser": "hermes"}


@pytest.mark.parametrize("beside", [0, 1])
async def test_vllms_own_server_tells_a_stream_alike_by_both_ways(monkeypatch, quiet_root, beside):
    """vLLM's whole server over a scripted engine, under uvicorn; one odd field keeps the fast stream out, and so with
    it whatever process there is beside the server to send its tokens."""
    prompt = {"prompt": "Once upon a time", "stop": ["never said", "xyz"]}
    async with vllm_server(monkeypatch, HERMES, beside) as server:
        for path, request_fields in ((CHAT, MESSAGES), (COMPLETIONS, prompt)):
            told, short, counted = await server.both_ways(path, request_fields, STORY)
            assert short == [True, False]
            usage = [json.loads(text.split("\n\n")[-3][6:])["usage"]["total_tokens"] for text in told]
            assert counted == usage, "what the watch counts at the engine is what vLLM says"
            assert shape(told[0]) == shape(told[1])
            assert shape(told[0])[0] == STORY


def shape(text: str):
    chunks = [json.loads(line[6:]) for line in text.split("\n\n")[:-2]]
    assert text.endswith("data: [DONE]\n\n")
    holders = [one.get("delta", one) for chunk in chunks for one in chunk["choices"]]
    words = [holder.get("content", holder.get("text")) for holder in holders]
    shapes = []
    for chunk in chunks:
        for one in chunk["choices"]:
            holder = one.get("delta", one)
            holder.update({key: "" for key in ("content", "text") if key in holder})
        bare = {**chunk, "id": "", "created": 0}
        if bare not in shapes:
            shapes.append(bare)
    return "".join(words), shapes


TOOLS = {"tools": [{"type": "function", "function": {"name": name}} for name in ("weather", "time")], **MESSAGES}
WEATHER = '{"name": "weather", "arguments": {"city": "Zürich 😀", "days": [1, 2]}}'
CALL = f"I look it up: 1 < 2. <tool_call>\n{WEATHER}\n</tool_call>"
CALLS = CALL + '\n<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
LOGPROBS = {"logprobs": True, "top_logprobs": 2}
THOUGHT = "Here is my thought process: five ships, no, six. Here is my response: six ships."


@pytest.mark.parametrize(
    ("options", "stories"),
    [
        (HERMES, [(TOOLS, STORY.replace("<tool_call>", "")), (TOOLS, CALL), (TOOLS, CALLS), (TOOLS, CALL[:50])]),
        (
            {"reasoning_parser": "granite", **HERMES},
            [(MESSAGES, THOUGHT), (TOOLS, THOUGHT + CALL), ({**TOOLS, **LOGPROBS}, THOUGHT + CALL)],
        ),
        ({}, [({**MESSAGES, **LOGPROBS}, STORY), ({**MESSAGES, "logprobs": True}, STORY)]),
    ],
    ids=["tools", "reasoning", "logprobs"],
)
async def test_what_vllms_parser_makes_of_a_text_is_told_alike(options, stories, monkeypatch, quiet_root):
    written, write = [], FastStream._write

    def note(way, piece):
        written.append(piece)
        write(way, piece)

    monkeypatch.setattr(FastStream, "_write", note)
    async with vllm_server(monkeypatch, options, beside=1) as server:
        for request_fields, story in stories:
            for stops in (True, False):
                written.clear()
                told, short, counted = await server.both_ways(CHAT, request_fields, story, stops)
                assert short == [True, False] and len(written) > 3
                assert parsed(told[0]) == parsed(told[1])
                assert counted == [parsed(text)["usage"]["total_tokens"] for text in told]


def parsed(text):
    """All that a client gets, ids and the number of chunks apart; and every form that a chunk had."""
    chunks = [json.loads(line[6:]) for line in text.split("\n\n")[:-2]]
    assert text.endswith("data: [DONE]\n\n")
    whole = {"content": "", "reasoning": "", "calls": {}, "reasons": [], "usage": chunks[-1]["usage"], "forms": set()}
    whole["logprobs"] = []
    for chunk in chunks[:-1]:
        (choice,) = chunk["choices"]
        delta = choice["delta"]
        whole["content"] += delta.get("content") or ""
        whole["reasoning"] += delta.get("reasoning") or ""
        whole["logprobs"] += (choice["logprobs"] or {"content": []})["content"]
        whole["reasons"] += [choice["finish_reason"]] if choice["finish_reason"] else []
        for call in delta.get("tool_calls") or []:
            told = whole["calls"].setdefault(call["index"], ["", ""])
            told[0] += call["function"].get("name") or ""
            told[1] += call["function"].get("arguments") or ""
        whole["forms"].add((*chunk, *choice, *delta) if choice["finish_reason"] is None else tuple(chunk))
    return whole


class Both:
    """vLLM's own server over a scripted core."""

    def __init__(self, url, core, tokenizer):
        self._url = url
        self._core = core
        self._tokenizer = tokenizer
        self.short = []
        self.counted = []

    async def both_ways(self, path, request_fields, story, stops=False):
        """The texts of two streams, whether each took the fast stream, and the tokens that the watch counted."""
        tokens = self._tokenizer(story, add_special_tokens=False)["input_ids"]
        self._core.tokens, self._core.stops = [*tokens, self._tokenizer.eos_token_id] if stops else tokens, stops
        self.short.clear()
        self.counted.clear()
        told = []
        async with httpx.AsyncClient(timeout=60) as client:
            for more in ({}, {"echo": False}):
                ask = {"model": "base", "max_tokens": 200, "stream": True, "stream_options": {"include_usage": True}}
                answer = await client.post(self._url + path, json={**ask, **request_fields, **more})
                told.append(answer.raise_for_status().text)
        return told, list(self.short), list(self.counted)


def _replaced(serving, ours, stock, *arguments, **more):
    return ours(stock, serving, *arguments, **more)


@asynccontextmanager
async def vllm_server(monkeypatch, options, beside=0):
    """`beside`: further processes that send tokens."""
    pytest.importorskip("vllm")
    from transformers import AutoTokenizer
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core_client import EngineCoreClient

    from serve.asgi.exchange import Watch, count_generated_tokens, count_prompt_tokens, watching
    from serve.models.embedded import ensure
    from serve.vllm_backend.detokenizer import TokenTexts
    from serve.vllm_backend.engine_arguments import parse
    from serve.vllm_backend.output_processor import Outputs
    from serve.vllm_backend.parsed_stream import create_chat_logprobs, make_parser
    from serve.vllm_backend.vllm_metrics import own_series

    model = str(ensure("smollm2"))
    args = parse(model, "base", {"max_model_len": 2048, "kv_cache_memory_bytes": "1G", **options})
    core = Scripted()
    monkeypatch.setattr(EngineCoreClient, "make_async_mp_client", lambda *_, **__: core)
    for name, ours in (("_make_parser", make_parser), ("_create_chat_logprobs", create_chat_logprobs)):
        stock = getattr(OpenAIServingChat, name)
        if stock.__module__ != ours.__module__:  # no server of this process has put it there
            monkeypatch.setattr(OpenAIServingChat, name, partialmethod(_replaced, ours, stock))
    with own_series(CollectorRegistry()):
        llm = AsyncLLM.from_engine_args(AsyncEngineArgs.from_cli_args(args), stat_loggers=[])
    outputs = llm.output_processor
    outputs.__class__, outputs.plain, outputs.parses = Outputs, "reasoning_parser" not in options, True
    outputs.calls_tools = True
    outputs.texts, outputs.lean_stats = TokenTexts.of(outputs.tokenizer), True
    app = build_app(args, ("generate",), llm.model_config)
    await init_app_state(llm, app.state, args, ("generate",))

    async def endpoint(scope, receive, send):
        message = await receive()
        call = CancellableCall(receive, send, lambda: None)
        way = FastStream.of(scope, json.loads(message["body"]), send, call)
        watch = Watch(fast_stream=way)
        again = [message]

        async def replay():
            return again.pop() if again else await receive()

        token = watching.set(watch)
        try:
            await app(scope, replay, way.send if way else send)
        finally:
            watching.reset(token)
        both.short.append(bool(way and way.taken and way.learned))
        generations = [sequence.read() for sequence in watch.sequences]
        both.counted.append(count_prompt_tokens(generations) + count_generated_tokens(generations))

    front_ends = FrontEnds(beside)
    http = guarded(60, front_ends=front_ends)
    try:
        async with listening(endpoint, http=http, lifespan="off") as url, front_ends.running():
            assert await settled(lambda: len(front_ends.pids) == beside)
            both = Both(url, core, AutoTokenizer.from_pretrained(model))
            yield both
            assert bool(front_ends.handed) == bool(beside)
    finally:
        llm.shutdown()
