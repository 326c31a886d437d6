"""Drafts for running answers on a CPU, put before vLLM's scheduler at every step.

Where a sequence copies from its prompt or repeats itself, the tokens that are likely to come (`drafts`) are computed
in one step with its next one, and those that the sampler would have chosen count (`cpu_kernels.verification`). A step
without drafts is the step that it would have been.

A sequence whose tokens depend on more than the logits of their place and the settings of its sampling goes without
drafts, and so does one with stop strings: vLLM looks for them once a step, and would count the tokens behind one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from serve.cpu_kernels import verification
from serve.cpu_kernels.drafts import MOST, MOST_IN_STEP, Bets, Bettor, DraftPrice

log = logging.getLogger("loradock")

VARIABLE = "LORADOCK_SPECULATION"
# Tokens of answers in a step that has drafts.
ROWS = 64
# With one of these a token depends on the others of its answer, or on a grammar, or its answer is more than tokens.
APART = (
    "presence_penalty",
    "frequency_penalty",
    "min_p",
    "stop",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "structured_outputs",
    "thinking_token_budget",
    "logprob_token_ids",
    "repetition_detection",
    "trace_decode_token_ids",
    "watermarking",
)


class Speculation:
    """One scheduler's drafts."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._bets = Bets()
        self._cost = DraftPrice()
        self._began = 0.0
        self._rows = 0  # of the step under way, if nothing of a prompt is in it
        self._said_why_not = False

    def draft(self, scheduler: Any) -> None:
        """Give running answers what may be computed with their next token."""
        if refusal := verification.refusal():
            if not self._said_why_not:
                log.warning("nothing is drafted: %s", refusal)
            self._said_why_not = True
            return
        for request in scheduler.running:
            request.spec_token_ids = []  # of a step that did not come to it
        if scheduler.connector is not None:
            return
        answers = [it for it in scheduler.running if it.num_tokens - it.num_computed_tokens == 1]
        room = _room(scheduler, len(answers))
        for request in answers:
            bettor = _bettor(request)
            if bettor is None or request.num_output_tokens < request.sampling_params.min_tokens:
                continue
            bettor.said(request.all_token_ids[len(bettor.continuations.tokens) :])
            most = max(0, min(room, request.max_tokens - request.num_output_tokens - 1))
            drafts = self._bets.draft(bettor, self._cost.price(len(answers)), most)
            request.spec_token_ids = drafts
            room -= len(drafts)

    def began(self, output: Any) -> None:
        """A step is computed from now on."""
        drafts = output.scheduled_spec_decode_tokens
        scheduled = output.num_scheduled_tokens
        answers = all(tokens == 1 + len(drafts.get(name, ())) for name, tokens in scheduled.items())
        self._rows = output.total_num_scheduled_tokens if answers else 0
        self._began = self._clock()

    def ended(self) -> None:
        """The step is over."""
        if self._rows:
            self._cost.took(self._rows, self._clock() - self._began)
        self._rows = 0

    def settle(self, request: Any, drafted: int, accepted: int) -> None:
        """So many of a request's drafts were computed in a step, and right."""
        self._bets.settle(request.loradock_bettor, drafted, accepted)
        if request.spec_decode_metrics is None:  # vLLM counts in it from now on
            request.spec_decode_metrics = verification.counts(MOST)


def schedule(original: Callable[..., Any], scheduler: Any, throttle_prefills: bool = False) -> Any:
    """vLLM's choice of what the next step computes, drafts included."""
    speculation = _speculation(scheduler)
    speculation.draft(scheduler)
    output = original(scheduler, throttle_prefills)
    speculation.began(output)
    return output


def update_from_output(original: Callable[..., Any], scheduler: Any, *args: Any) -> Any:
    """vLLM's end of a step."""
    _speculation(scheduler).ended()
    return original(scheduler, *args)


def make_spec_decoding_stats(
    original: Callable[..., Any],
    scheduler: Any,
    spec_decoding_stats: Any,
    num_draft_tokens: int,
    num_accepted_tokens: int,
    num_invalid_spec_tokens: Any,
    request_id: str,
) -> None:
    """In place of vLLM's, whose series are those of a speculative_config."""
    _speculation(scheduler).settle(scheduler.requests[request_id], num_draft_tokens, num_accepted_tokens)


def _speculation(scheduler: Any) -> Speculation:
    speculation: Speculation | None = getattr(scheduler, "loradock_speculation", None)
    if speculation is None:
        speculation = scheduler.loradock_speculation = Speculation()
    return speculation


def _room(scheduler: Any, answers: int) -> int:
    """How many drafts a step takes that pushes nobody out of it, or out of the KV cache."""
    free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    # A sequence's next tokens begin two blocks at most.
    if free < 2 * len(scheduler.running) * len(scheduler.kv_cache_config.kv_cache_groups):
        return 0
    return min(MOST_IN_STEP, ROWS - answers, scheduler.max_num_scheduled_tokens - len(scheduler.running))


def _bettor(request: Any) -> Bettor | None:
    """None for a request that goes without drafts."""
    if not hasattr(request, "loradock_bettor"):
        request.loradock_bettor = None
        if drafts_fit(request):
            name = request.lora_request.lora_name if request.lora_request else ""
            request.loradock_bettor = Bettor(name)
            request.loradock_bettor.continuations.extend(request.all_token_ids)
    bettor: Bettor | None = request.loradock_bettor
    return bettor


def drafts_fit(request: Any) -> bool:
    """Whether a request's tokens are the same with drafts."""
    params = request.sampling_params
    return not (
        params is None
        or params.repetition_penalty != 1
        or any(getattr(params, name) for name in APART)
        or request.prompt_token_ids is None
        or request.prompt_embeds is not None
        or request.mm_features
        or request.resumable
    )
