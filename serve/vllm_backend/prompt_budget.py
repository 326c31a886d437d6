"""How much of prompts a step computes on a CPU, where everybody who is answered waits for the step.

vLLM fills a step with up to `max_num_batched_tokens` tokens of prompts. On a GPU that takes milliseconds. On two cores
2,048 tokens take more than a second, and as long no running answer gets its next token. So while answers are running,
a step takes as many tokens of prompts as were computed in `target_inter_token` seconds of the steps before. While
nothing but prompts is computed, a step is as large as vLLM makes it.

A short prompt does not wait for long ones before it. Prompts wait in the order of their arrival plus the time that they
take, so that a short one is before a long one that came a little earlier, and none is passed for ever. A long prompt
that is being computed leaves `SHORT` of a step to a short one that waits.

Log-probabilities of a prompt compare each of its rows with the whole vocabulary: then a step takes `ROWS` at most.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from serve.cpu_kernels.patches import Patch, apply

VARIABLE = "LORADOCK_TARGET_INTER_TOKEN"
# Tokens of prompts in a step, while one of the prompts wants log-probabilities: some 0.3 s of two cores.
ROWS = 256
# The least that a step takes of prompts: a step reads all weights, whatever it computes.
LEAST = 32
# Before anything was measured.
FIRST = 256
# A prompt is short up to this part of a step's tokens of prompts.
SHORT = 0.25
# Seconds that a token of a prompt takes at least: a step may take less than those of many answers before it.
QUICKEST = 1e-6
# What a new measurement counts for.
_FADE = 0.3

_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_WHY = "prompts of some thousand tokens take seconds of a CPU, in one step that everybody waits for"
PATCHES = [
    Patch(_SCHEDULER, "schedule", "self throttle_prefills", f"{__name__}:schedule", _WHY),
    Patch(
        _SCHEDULER,
        "update_from_output",
        "self scheduler_output model_runner_output",
        f"{__name__}:update_from_output",
        _WHY,
    ),
    Patch(_SCHEDULER, "add_request", "self request", f"{__name__}:add_request", _WHY),
]


def install() -> None:
    """In each of vLLM's processes, where it computes on a CPU."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        apply(PATCHES)


@dataclass(slots=True)
class PromptBudget:
    """How many tokens of prompts were computed in `target` seconds, by the steps that had `LEAST` of them or more."""

    target: float
    clock: Callable[[], float] = time.monotonic
    # Seconds for a token of a prompt, and for a step without one.
    seconds: float | None = None
    others: float = 0.0
    # Of the steps that are computed now: when they began, and how many tokens of prompts are in them.
    _steps: deque[tuple[float, int | None]] = field(default_factory=deque)
    _ended: float = 0.0

    @property
    def tokens(self) -> int:
        if self.seconds is None:
            return FIRST
        return max(LEAST, int(self.target / self.seconds))

    def began(self, tokens: int | None) -> None:
        """A step with so many tokens of prompts is computed from now on, or after those that began before it.

        None for a step that computes nothing.
        """
        self._steps.append((self.clock(), tokens))

    def ended(self) -> None:
        """The oldest of the steps is over."""
        if not self._steps:
            return
        began, tokens = self._steps.popleft()
        now = self.clock()
        seconds, self._ended = now - max(began, self._ended), now
        if tokens is None:
            return
        if tokens >= LEAST:
            each = max((seconds - self.others) / tokens, QUICKEST)
            self.seconds = each if self.seconds is None else self.seconds + _FADE * (each - self.seconds)
        elif not tokens:
            self.others += _FADE * (seconds - self.others)


def add_request(original: Callable[..., Any], scheduler: Any, request: Any) -> Any:
    """vLLM's taking of a request into its queue, which is ordered by arrival where priorities are the same."""
    budget = _budget(scheduler)
    if budget.target and budget.seconds:
        request.arrival_time += budget.seconds * request.num_prompt_tokens
    return original(scheduler, request)


def schedule(original: Callable[..., Any], scheduler: Any, throttle_prefills: bool = False) -> Any:
    """vLLM's choice of what the next step computes, with less of prompts where that would take long."""
    budget = _budget(scheduler)
    tokens = _prompt_tokens(scheduler, budget)
    if tokens is None:
        output = original(scheduler, throttle_prefills)
    else:
        with _limited(scheduler, tokens):
            output = original(scheduler, throttle_prefills)
    scheduled, answer = output.num_scheduled_tokens.values(), _tokens_of_an_answer(scheduler)
    budget.began(sum(tokens for tokens in scheduled if tokens > answer) if scheduled else None)
    return output


def update_from_output(
    original: Callable[..., Any], scheduler: Any, scheduler_output: Any, model_runner_output: Any
) -> Any:
    """vLLM's end of a step."""
    _budget(scheduler).ended()
    return original(scheduler, scheduler_output, model_runner_output)


def _prompt_tokens(scheduler: Any, budget: PromptBudget) -> int | None:
    """How many tokens of prompts the next step may take; None for as many as vLLM takes."""
    config = scheduler.scheduler_config
    if not config.enable_chunked_prefill or config.disable_chunked_mm_input:
        return None  # a prompt, or a picture in it, that is longer than the step would wait until nobody is answered
    answering = budget.target and any(not _in_prompt(request) for request in scheduler.running)
    tokens = budget.tokens if answering else None
    if _prompt_logprobs_wanted(scheduler):
        return ROWS if tokens is None else min(tokens, ROWS)
    return tokens


@contextmanager
def _limited(scheduler: Any, tokens: int) -> Iterator[None]:
    """Within the block a step takes so many tokens of prompts at most, and leaves some of them to a short one."""
    config = scheduler.scheduler_config
    before = (
        scheduler.max_num_scheduled_tokens,
        config.long_prefill_token_threshold,
        scheduler.adaptive_long_prefill_threshold,
    )
    # Who came during a long prompt stands behind it, and would get no token before that prompt is whole.
    scheduler.running.sort(key=_in_prompt)
    answers = sum(not _in_prompt(request) for request in scheduler.running)
    scheduler.max_num_scheduled_tokens = min(before[0], tokens + answers * _tokens_of_an_answer(scheduler))
    if not before[1] and scheduler.waiting:
        short = int(SHORT * tokens)
        if scheduler.waiting.peek_request().num_prompt_tokens <= short:
            config.long_prefill_token_threshold = tokens - short
            scheduler.adaptive_long_prefill_threshold = False
    try:
        yield
    finally:
        scheduler.max_num_scheduled_tokens = before[0]
        config.long_prefill_token_threshold, scheduler.adaptive_long_prefill_threshold = before[1:]


def _budget(scheduler: Any) -> PromptBudget:
    budget: PromptBudget | None = getattr(scheduler, "loradock_prompt_budget", None)
    if budget is None:
        budget = scheduler.loradock_prompt_budget = PromptBudget(float(os.environ.get(VARIABLE) or 0))
    return budget


def _in_prompt(request: Any) -> bool:
    return bool(request.num_computed_tokens < request.num_prompt_tokens)


def _tokens_of_an_answer(scheduler: Any) -> int:
    """How many a step computes of a running answer at most: the next one, and those that were drafted after it."""
    return 1 + int(scheduler.num_spec_tokens)


def _prompt_logprobs_wanted(scheduler: Any) -> bool:
    """Whether a request that is not computed to the end of its prompt wants log-probabilities of it."""
    # Not `waiting`: vLLM's queue of priorities sorts a copy of itself for whoever goes through it.
    return any(
        request.sampling_params is not None
        and request.sampling_params.prompt_logprobs is not None
        and _in_prompt(request)
        for request in scheduler.requests.values()
    )
