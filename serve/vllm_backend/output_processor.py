"""What vLLM's engine sends of each sequence, as it comes into this process: watched, and sent on by the fast stream.

Every token passes vLLM's output processor, which is subclassed here.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from copy import copy
from functools import partial
from types import MappingProxyType
from typing import Any, cast

from vllm.entrypoints.generate.base.protocol import DeltaMessage
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.logprobs import LogprobsProcessor
from vllm.v1.engine.output_processor import OutputProcessor, OutputProcessorOutput, RequestState
from vllm.v1.metrics.stats import IterationStats, RequestStateStats

from serve.asgi.exchange import Generation, Parameters, watching
from serve.asgi.fast_stream import FastStream
from serve.errors import LoradockError
from serve.vllm_backend.adapter_tokenizers import AdapterTokenizers
from serve.vllm_backend.coalescing import Coalescing
from serve.vllm_backend.detokenizer import TokenTexts, look_up
from serve.vllm_backend.parsed_stream import Handover, ParsedDeltas, delta_json
from serve.vllm_backend.step_times import StepTimes

log = logging.getLogger(__name__)

# vLLM's own way gets the first token and the last; see serve.asgi.fast_stream.
NEVER = 1 << 30
# How the engine's names of the server's own requests begin; no client's does.
OWN = "probe-"
# So many tokens may wait for vLLM's first chunk. Then it makes none that the fast stream could learn from.
PATIENCE = 64
# What shapes an answer beside length, temperature and structure. `n` and `seed` do not.
OTHERS = (
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "top_p",
    "top_k",
    "min_p",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "min_tokens",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "thinking_token_budget",
)
_DEFAULTS = SamplingParams()
_USUAL = tuple(getattr(_DEFAULTS, name) for name in OTHERS)


class Outputs(OutputProcessor):
    """vLLM's, which every token passes in this process; leaves each sequence with the Watch of its request."""

    # Whether vLLM's way adds nothing to a plain stream; its backend knows.
    plain = False
    # Whether it adds nothing to a stream but what its parser makes of the text, and whether that may call tools.
    parses = calls_tools = False
    # Who is charged for the engine's time; its backend hands it in.
    step_times: StepTimes | None = None
    # Whether drafts are counted for us and no answer tells of them; its backend knows.
    counts_drafts = False
    # The texts of single tokens, where those make up an answer's text; its backend knows.
    texts: TokenTexts | None = None
    # Whether a token is counted here, without vLLM's look into the environment for each; its backend knows.
    lean_stats = False
    # Of adapters that add tokens; its backend hands it in.
    tokenizers: AdapterTokenizers | None = None
    # Adapters that classify, and say nothing; its backend hands them in.
    heads: Mapping[str, Any] = MappingProxyType({})
    # Where the tokens of streams wait for one another, if they do; its backend knows.
    coalescing: Coalescing | None = None

    def add_request(self, request: EngineCoreRequest, *args: Any, **kwargs: Any) -> None:
        watch = watching.get()
        if watch is not None and watch.gate is not None:
            try:
                watch.gate(request.prompt_token_ids if request.prompt_embeds is None else None)
            except LoradockError as error:
                raise VLLMValidationError(error.message) from error
        self._check_says(request)
        own = self._tokenizer_of(request)
        base = getattr(self, "tokenizer")  # noqa: B009  vLLM's, of no known type
        self.tokenizer = own or base
        try:
            super().add_request(request, *args, **kwargs)
        finally:
            self.tokenizer = base
        state = cast(Any, self.request_states.get(request.request_id))
        if state is None or hasattr(state, "background"):
            return
        state.background = watch is None or watch.background
        state.watched = None
        state.fast_stream = None
        if self.texts is not None and own is None:
            look_up(state.detokenizer, self.texts)
        if watch is None:
            return
        sequence = _Sequence(state, parameters_of(request.sampling_params, watch.tools))
        watch.sequences.append(sequence)
        state.watched = sequence
        if watch.logprobs:
            ask_logprobs(request, state)
        if watch.fast_stream is not None and not watch.fast_stream.taken and _alone(state):
            self._take_stream(state, watch.fast_stream)
        if self.coalescing is not None and state.fast_stream is None:
            self.coalescing.collect(state.queue)

    def _check_says(self, request: EngineCoreRequest) -> None:
        lora = request.lora_request
        if lora is not None and lora.lora_name in self.heads and not str(request.external_req_id).startswith(OWN):
            raise VLLMValidationError(f"{lora.lora_name} classifies texts and writes none: ask it by /v1/classify")

    def _tokenizer_of(self, request: EngineCoreRequest) -> Any:
        """Its adapter's, if that adds tokens."""
        if self.tokenizers is None or request.lora_request is None:
            return None
        own = self.tokenizers.of(request.lora_request.lora_name)
        if own is not None and request.sampling_params and request.sampling_params.structured_outputs is not None:
            raise VLLMValidationError(
                "this adapter adds tokens to the base's, which a grammar does not know: ask without structured outputs"
            )
        return own

    def _take_stream(self, state: Any, stream: FastStream) -> None:
        """Have the stream send a sequence's tokens, if it can. vLLM's way looks for strings that end an answer."""
        stops = getattr(state.detokenizer, "stop", True)
        if stream.has_logprobs and stream.parser is None:
            stream.parser = ParsedDeltas()
        if self.plain and not stream.has_tools and not stream.has_logprobs:
            stream.taken = True
            state.fast_stream, state.runs_on = stream, not stops
            state.stream_interval = NEVER
        elif self.parses and stream.parser is not None and not stops and (self.calls_tools or not stream.has_tools):
            stream.taken = stream.parsed = True
            state.fast_stream, state.runs_on = stream, False

    def process_outputs(
        self,
        engine_core_outputs: list[EngineCoreOutput],
        engine_core_timestamp: float | None = None,
        iteration_stats: IterationStats | None = None,
        weight_version: str | None = None,
    ) -> OutputProcessorOutput:
        # States before: those that end here are forgotten by then.
        computed: list[tuple[Any, int]] = []
        others: list[tuple[Any, EngineCoreOutput, bool]] = []
        states: dict[str, Any] = self.request_states
        for output in engine_core_outputs:
            state = states.get(output.request_id)
            if state is None:
                continue
            stream = state.fast_stream
            if stream is not None and stream.parsed and not state.runs_on:
                _begin_parsed(state)
            if stream is not None and _goes_on(state, output):
                self._update_stats_from_output(state, output, engine_core_timestamp, iteration_stats)
                _take(state, output, weight_version)
                self._send_on(state)
                computed.append((state, len(output.new_token_ids)))
            else:
                others.append((state, output, state.is_prefilling))
        done = self._process_others(others, engine_core_timestamp, iteration_stats, weight_version)
        if self.step_times is not None and engine_core_timestamp is not None:
            computed += [(state, _tokens(state, output, began)) for state, output, began in others]
            self.step_times.computed(computed, engine_core_timestamp)
        return done

    def _process_others(
        self, others: list[tuple[Any, EngineCoreOutput, bool]], *arguments: Any
    ) -> OutputProcessorOutput:
        """By vLLM's own way."""
        if self.counts_drafts:
            for state, output, _ in others:
                _count_drafts(state, output)
        done = super().process_outputs([output for _, output, _ in others], *arguments)
        for state, output, _ in others:
            if state.fast_stream is not None and output.request_id in self.request_states:
                self._send_on(state)
        return done

    def _send_on(self, state: Any) -> None:
        stream = state.fast_stream
        if stream.parsed and not state.runs_on:
            return
        if self.coalescing is None and not stream.is_handed:
            _forward(state, stream)
        elif self.coalescing is None:
            if text := state.detokenizer.get_next_output_text(False, True):
                stream.say(text)
        else:
            self.coalescing.hold(state.request_id, partial(self._release, state))

    def _release(self, state: Any) -> None:
        """Of a sequence that has ended meanwhile, vLLM's way has told the rest."""
        if state.fast_stream is not None and self.request_states.get(state.request_id) is state:
            _forward(state, state.fast_stream)

    def _update_stats_from_output(
        self,
        req_state: RequestState,
        engine_core_output: EngineCoreOutput,
        engine_core_timestamp: float | None,
        iteration_stats: IterationStats | None,
    ) -> None:
        stats = req_state.stats
        if (
            not self.lean_stats
            or iteration_stats is None
            or stats is None
            or engine_core_timestamp is None
            or req_state.is_prefilling
            or engine_core_output.events is not None
            or engine_core_output.num_nans_in_logits
        ):
            super()._update_stats_from_output(req_state, engine_core_output, engine_core_timestamp, iteration_stats)
            return
        count = len(engine_core_output.new_token_ids)
        iteration_stats.num_generation_tokens += count
        stats.num_generation_tokens += count
        iteration_stats.inter_token_latencies_iter.append(engine_core_timestamp - stats.last_token_ts)
        stats.last_token_ts = engine_core_timestamp

    def _update_stats_from_finished(
        self, req_state: RequestState, finish_reason: FinishReason | None, *args: Any
    ) -> None:
        if (watched := getattr(req_state, "watched", None)) is not None and finish_reason is not None:
            watched.finish_reason = str(finish_reason)
        super()._update_stats_from_finished(req_state, finish_reason, *args)


def _tokens(state: RequestState, output: EngineCoreOutput, began: bool) -> int:
    """What a step computed for a sequence: of one that begins, the prompt as far as it was not cached."""
    prompt = state.prompt_len - state.num_cached_tokens if began else 0
    return max(1, prompt, len(output.new_token_ids))


def _count_drafts(state: RequestState, output: EngineCoreOutput) -> None:
    """What the engine tells with a sequence's end; vLLM would put it into the answer."""
    counts, output.spec_decode_metrics = output.spec_decode_metrics, None
    watched = getattr(state, "watched", None)
    if counts is not None and watched is not None:
        accepted = sum(number * steps for number, steps in enumerate(counts.histogram))
        watched.drafts = counts.num_draft_tokens, accepted


def _alone(state: RequestState) -> bool:
    """A sequence that streams, is the only one of its request, and is told as it comes."""
    streams = state.queue is not None and state.output_kind is RequestOutputKind.DELTA
    return streams and state.parent_req is None and not state.streaming_input and state.stream_interval == 1


def _goes_on(state: Any, output: EngineCoreOutput) -> bool:
    """An output in the middle of a stream: tokens, and nothing else that vLLM's way would do something with."""
    return (
        state.runs_on
        and output.finish_reason is None
        and output.events is None
        and state.sent_tokens_offset > 0
        and output.routed_experts is None
        and output.new_sampling_mask is None
        and output.new_prompt_logprobs_tensors is None
        and output.spec_decode_metrics is None
    )


def _take(state: Any, output: EngineCoreOutput, weight_version: str | None) -> None:
    """The tokens' text, and their log-probabilities for the watcher."""
    if weight_version is not None and output.new_token_ids:
        state.track_weight_version(weight_version)
    state.detokenizer.update(output.new_token_ids, False)
    if output.new_logprobs is not None:
        state.logprobs_processor.update_from_output(output)


def _forward(state: Any, fast_stream: FastStream) -> None:
    """Send on what this sequence said since, if it has its turn; what has not, goes with what comes next."""
    if fast_stream.parsed:
        _forward_parsed(state, fast_stream)
        return
    if state.queue.output is not None:
        fast_stream.in_order = False
        return
    if not fast_stream.in_order:
        waiting = state.detokenizer.num_output_tokens() - state.sent_tokens_offset
        if waiting > PATIENCE and not fast_stream.learned:
            state.fast_stream = None
            _go_round(state)
    elif fast_stream.blocked:
        fast_stream.in_order = False
        _go_round(state)
        state.stream_interval = NEVER
    elif text := state.detokenizer.get_next_output_text(finished=False, delta=True):
        try:
            fast_stream.write(text)
        except Exception:  # of one stream; all others pass here too
            log.exception("a stream goes on without its fast stream")
            state.fast_stream = None
            _go_round(state)


def _begin_parsed(state: Any) -> None:
    """Once vLLM's way has told all that it was given, and a chunk was seen: what comes now is for the fast stream."""
    stream = state.fast_stream
    if stream.learned and stream.parser.begun and state.queue.output is None and not stream.blocked:
        state.sent_tokens_offset = state.detokenizer.num_output_tokens()
        state.stream_interval = NEVER
        state.runs_on = True


def _forward_parsed(state: Any, stream: FastStream) -> None:
    if state.queue.output is not None:
        return
    if stream.blocked:
        _go_round(state)
        state.stream_interval = NEVER
        return
    parser = cast(ParsedDeltas, stream.parser)
    tokens = state.detokenizer.output_token_ids[state.sent_tokens_offset + parser.ahead :]
    text = state.detokenizer.get_next_output_text(finished=False, delta=True)
    try:
        delta = parser.parse(text, tokens)
        logprobs = b""
        if stream.has_logprobs:
            values = state.logprobs_processor.logprobs
            logprobs = parser.logprobs(tokens, values[len(values) - len(tokens) :])
            delta = DeltaMessage() if delta is None else delta
        if delta is not None:
            stream.write_delta(delta_json(delta), logprobs)
    except Handover:
        _go_round(state)
        state.stream_interval = NEVER
    except Exception:  # of one stream; all others pass here too
        log.exception("a stream goes on without its fast stream")
        state.fast_stream = None
        _go_round(state)


def _go_round(state: RequestState) -> None:
    """Let vLLM's way have all that it was not given yet; only what was not sent is in its text."""
    sent = state.sent_tokens_offset
    state.sent_tokens_offset = state.detokenizer.num_output_tokens()
    state.stream_interval = 1
    state.queue.put(state.make_request_output(state.detokenizer.output_token_ids[sent:], None, None, None))


def parameters_of(params: SamplingParams | None, tools: bool = False) -> Parameters | None:
    """None for what generates nothing."""
    if params is None:
        return None
    unusual = [
        (name, value) for name, usual in zip(OTHERS, _USUAL, strict=True) if (value := getattr(params, name)) != usual
    ]
    return Parameters(
        max_tokens=params.max_tokens or 0,
        temperature=float(params.temperature),
        constrained=params.structured_outputs is not None,
        tools=tools,
        others=hashlib.blake2b(repr(unusual).encode(), digest_size=4).hexdigest() if unusual else "",
    )


class _Sequence:
    """What there is to know of a sequence, whether it has ended or its client has left."""

    def __init__(self, state: RequestState, parameters: Parameters | None = None) -> None:
        self._state = state
        self._parameters = parameters
        self.engine_seconds = 0.0
        self.finish_reason = "abort"
        self.drafts = (0, 0)
        self.stats: Timed | None = None
        if state.stats is not None:
            state.stats = self.stats = Timed(**vars(state.stats))

    def read(self) -> Generation:
        state, stats = self._state, self.stats
        output = state.detokenizer.output_token_ids if state.detokenizer else []
        prompt = state.prompt_token_ids or []
        text = getattr(state.detokenizer, "output_text", "")
        cached, parameters = state.num_cached_tokens, self._parameters
        if stats is None:
            return Generation(
                prompt,
                output,
                self.finish_reason,
                text,
                logprobs=self._logprobs(),
                cached=cached,
                engine_seconds=self.engine_seconds,
                parameters=parameters,
                drafts=self.drafts,
            )
        begun = stats.first_token_ts > 0
        later = len(output) - 1
        return Generation(
            prompt,
            output,
            self.finish_reason,
            text,
            queue=max(stats.scheduled_ts - stats.queued_ts, 0.0) if stats.scheduled_ts else None,
            first=stats.arrival_time + stats.first_token_latency if begun else None,
            gap=(stats.last_token_ts - stats.first_token_ts) / later if begun and later > 0 else None,
            worst_gap=stats.worst if begun and later > 0 else None,
            logprobs=self._logprobs(),
            cached=cached,
            engine_seconds=self.engine_seconds,
            parameters=parameters,
            prefill=max(stats.first_token_ts - stats.scheduled_ts, 0.0) if begun and stats.scheduled_ts else None,
            drafts=self.drafts,
        )

    def _logprobs(self) -> list[float] | None:
        processor = self._state.logprobs_processor
        if isinstance(processor, _Unseen):
            return processor.kept
        if processor is None or not processor.logprobs or self._state.detokenizer is None:
            return None
        ids = self._state.detokenizer.output_token_ids
        return [
            values[token].logprob for token, values in zip(ids, processor.logprobs, strict=False) if token in values
        ]


class Timed(RequestStateStats):
    """Remembers the longest wait between two tokens as well."""

    worst = 0.0
    _last = 0.0

    @property
    def last_token_ts(self) -> float:
        return self._last

    @last_token_ts.setter
    def last_token_ts(self, now: float) -> None:
        if self._last and now - self._last > self.worst:
            self.worst = now - self._last
        self._last = now


class _Unseen(LogprobsProcessor):
    """Keeps the log-probabilities of the sampled tokens for the watcher; the answer has none."""

    def update_from_output(self, output: EngineCoreOutput) -> None:
        if output.new_logprobs is not None:
            # The sampled token comes first in each row.
            self.kept.extend(output.new_logprobs.logprobs[:, 0].tolist())
            output.new_logprobs = None
        super().update_from_output(output)


def ask_logprobs(request: EngineCoreRequest, state: RequestState) -> None:
    """Have the engine tell the sampled tokens' log-probabilities, if the client did not ask for any.

    The request goes to the engine after this; what becomes an answer was set up before.
    """
    params, processor = request.sampling_params, state.logprobs_processor
    if params is None or processor is None or params.num_logprobs is not None:
        return
    unseen = _Unseen(**vars(processor))
    unseen.kept = []
    state.logprobs_processor = unseen
    request.sampling_params = copy(params)
    request.sampling_params.logprobs = 0
