"""What vLLM's engine sends of each sequence, as it comes into this process: watched, and sent on by the fast stream.

Every token passes vLLM's output processor, which is subclassed here.
"""

from __future__ import annotations

import hashlib
import logging
from copy import copy
from typing import Any, cast

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.logprobs import LogprobsProcessor
from vllm.v1.engine.output_processor import OutputProcessor, OutputProcessorOutput, RequestState
from vllm.v1.metrics.stats import RequestStateStats

from serve.asgi.exchange import Generation, Parameters, watching
from serve.asgi.fast_stream import FastStream
from serve.errors import LoradockError
from serve.vllm_backend.step_times import StepTimes

log = logging.getLogger(__name__)

# vLLM's own way gets the first token and the last; see serve.asgi.fast_stream.
NEVER = 1 << 30
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
    # Who is charged for the engine's time; its backend hands it in.
    step_times: StepTimes | None = None
    # Whether drafts are counted for us and no answer tells of them; its backend knows.
    counts_drafts = False

    def add_request(self, request: EngineCoreRequest, *args: Any, **kwargs: Any) -> None:
        watch = watching.get()
        if watch is not None and watch.gate is not None:
            try:
                watch.gate(request.prompt_token_ids if request.prompt_embeds is None else None)
            except LoradockError as error:
                raise VLLMValidationError(error.message) from error
        super().add_request(request, *args, **kwargs)
        state = cast(Any, self.request_states.get(request.request_id))
        if state is None or hasattr(state, "background"):
            return
        state.background = watch is None or watch.background
        state.watched = None
        if watch is None:
            return
        sequence = _Sequence(state, parameters_of(request.sampling_params, watch.tools))
        watch.sequences.append(sequence)
        state.watched = sequence
        if watch.logprobs:
            ask_logprobs(request, state)
        fast_stream = watch.fast_stream
        if self.plain and fast_stream is not None and not fast_stream.taken and _alone(state):
            fast_stream.taken = True
            state.fast_stream = fast_stream
            state.stream_interval = NEVER

    def process_outputs(
        self,
        engine_core_outputs: list[EngineCoreOutput],
        engine_core_timestamp: float | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> OutputProcessorOutput:
        # Before: those that end here are forgotten by then.
        sequences = [
            (state, output, state.is_prefilling)
            for output in engine_core_outputs
            if (state := self.request_states.get(output.request_id)) is not None
        ]
        if self.counts_drafts:
            for state, output, _ in sequences:
                _count_drafts(state, output)
        done = super().process_outputs(engine_core_outputs, engine_core_timestamp, *args, **kwargs)
        if self.step_times is not None and engine_core_timestamp is not None:
            computed = [(state, _tokens(state, output, began)) for state, output, began in sequences]
            self.step_times.computed(computed, engine_core_timestamp)
        for state, output, _ in sequences:
            fast_stream = getattr(state, "fast_stream", None)
            if fast_stream is not None and output.request_id in self.request_states:
                _forward(state, fast_stream)
        return done

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


def _forward(state: RequestState, fast_stream: FastStream) -> None:
    """Send on what this sequence said since, if it has its turn; what has not, goes with what comes next."""
    if state.queue.output is not None:
        fast_stream.in_order = False
        return
    if not fast_stream.in_order:
        waiting = state.detokenizer.num_output_tokens() - state.sent_tokens_offset
        if waiting > PATIENCE and not fast_stream.learned:
            del state.fast_stream
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
            del state.fast_stream
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
        if self._last:
            self.worst = max(self.worst, now - self._last)
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
