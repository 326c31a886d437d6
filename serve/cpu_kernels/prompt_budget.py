"""How much of prompts a step computes on a CPU, where everybody who is answered waits for the step.

vLLM fills a step with up to `max_num_batched_tokens` tokens of prompts. On a GPU that takes milliseconds. On two cores
2,048 tokens take more than a second, and as long no running answer gets its next token. So while answers are running,
a step takes no more of prompts than it has time for: with prompts it takes `SLOWER` times what its answers take alone
(and `UNNOTICED` at least), or `target_inter_token` seconds for prompts where that is a number. Where more prompts wait
than answers are running, so many times as long, up to `NOTICED`: else the first of sixteen who come together keeps the
others waiting for longer than they all take. And it takes no less than what is worth a step with tiles. `step_costs`
knows what takes how long; for that a step is computed without prompts now and then. While nothing but prompts is
computed, a step is as large as vLLM makes it.

A short prompt does not wait for long ones before it. Prompts have their turn in the order of their arrival plus the
time that they take, those too that are being computed: a short one passes a long one that came a little earlier, and
none is passed for ever. Prompts that are being computed leave `EARLIER` of a step to who waits and is before them, and
`SHORT` of it to one that this is enough for.

Log-probabilities of a prompt compare each of its rows with the whole vocabulary: then a step takes `ROWS` at most.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from serve.cpu_kernels.build import instructions
from serve.cpu_kernels.install import VARIABLE as KERNELS
from serve.cpu_kernels.step_costs import Piece, StepCosts

VARIABLE = "LORADOCK_TARGET_INTER_TOKEN"
# Tokens of prompts in a step, while one of the prompts wants log-probabilities: some 0.3 s of two cores.
ROWS = 256
# How much longer a step may take beside prompts: below three times, with room for what cannot be foreseen.
SLOWER = 2.8
# Seconds of a step that nobody who reads notices: less would cost the first tokens of others for nothing.
UNNOTICED = 0.04
# Seconds of a step that others' first tokens are worth, however many they are.
NOTICED = 1.0
# A prompt is short up to this part of a step's tokens of prompts.
SHORT = 0.25
# What prompts that are being computed leave of a step to those that wait and have their turn before them.
EARLIER = 0.5
# Steps after which something is left once more to who did not take it: there is no room for its adapter, or its keys.
AGAIN = 8


@dataclass(slots=True)
class PromptBudget:
    """`target`: seconds for prompts in a step, 0 for any, None for what `SLOWER` says."""

    target: float | None
    costs: StepCosts = field(default_factory=StepCosts)
    _measuring: bool = False  # the last step had no prompts, so that its answers could be measured
    # To whom something of a step was left at last, and how many steps ago it did not take it.
    _left_to: str | None = None
    _steps: int = 0

    def tokens(self, answers: int, prompts: list[Piece], count: int) -> int:
        """How many tokens of these prompts, and of others after them (`count` in all), a step takes beside answers."""
        if self.target is not None:
            return self.costs.tokens(self.target, prompts)
        self._measuring = not self._measuring and self.costs.unknown(answers)
        if self._measuring:
            return 0
        seconds = max(UNNOTICED, SLOWER * self.costs.alone(answers))
        seconds = max(seconds, min(NOTICED, seconds * count / answers))
        return max(self.costs.worthwhile(NOTICED / 2), self.costs.tokens_beside(answers, seconds, prompts))

    def leaves(self, waiting: Any, tokens: int, first: Any) -> int:
        """How many of a step's tokens are left to who waits, by those of whom `first` is the first."""
        short = int(SHORT * tokens)
        earlier = _turn(waiting) < _turn(first)
        if not earlier and waiting.num_prompt_tokens > short:
            return 0
        again = waiting.request_id == self._left_to
        self._left_to, self._steps = waiting.request_id, self._steps + 1 if again else 0
        if self._steps % AGAIN:
            return 0
        return int(EARLIER * tokens) if earlier else short


def add_request(original: Callable[..., Any], scheduler: Any, request: Any) -> Any:
    """vLLM's taking of a request into its queue, which is ordered by arrival where priorities are the same."""
    budget = _budget(scheduler)
    if budget.target != 0:
        request.arrival_time += budget.costs.prompts([Piece(0, request.num_prompt_tokens)])
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
    budget.costs.began(*_computed(scheduler, output))
    return output


def update_from_output(
    original: Callable[..., Any], scheduler: Any, scheduler_output: Any, model_runner_output: Any
) -> Any:
    """vLLM's end of a step."""
    _budget(scheduler).costs.ended()
    return original(scheduler, scheduler_output, model_runner_output)


def _computed(scheduler: Any, output: Any) -> tuple[int, list[Piece]]:
    """How many answers a step goes on with, and what of which prompts it computes."""
    answers, pieces = 0, []
    for name, tokens in output.num_scheduled_tokens.items():
        request = scheduler.requests[name]
        before = request.num_computed_tokens - tokens  # by now these are counted as computed
        if before < request.num_prompt_tokens:
            pieces.append(Piece(before, tokens))
        else:
            answers += 1
    return answers, pieces


def _prompt_tokens(scheduler: Any, budget: PromptBudget) -> int | None:
    """How many tokens of prompts the next step may take; None for as many as vLLM takes."""
    config = scheduler.scheduler_config
    if not config.enable_chunked_prefill or config.disable_chunked_mm_input:
        return None  # a prompt, or a picture in it, that is longer than the step would wait until nobody is answered
    tokens = None
    answers = sum(not _in_prompt(request) for request in scheduler.running)
    if answers and budget.target != 0:
        prompts = [_rest(request) for request in sorted(filter(_in_prompt, scheduler.running), key=_turn)]
        room = scheduler.max_num_active_reqs - len(scheduler.running)
        count = len(prompts) + max(0, min(room, len(scheduler.waiting)))
        if scheduler.waiting:
            prompts.append(_rest(scheduler.waiting.peek_request()))
        tokens = budget.tokens(answers, prompts, count)
    if _prompt_logprobs_wanted(scheduler):
        return ROWS if tokens is None else min(tokens, ROWS)
    return tokens


@contextmanager
def _limited(scheduler: Any, tokens: int) -> Iterator[None]:
    """Within the block a step takes so many tokens of prompts at most, and leaves some of them to who is next."""
    config = scheduler.scheduler_config
    before = (
        scheduler.max_num_scheduled_tokens,
        config.long_prefill_token_threshold,
        scheduler.adaptive_long_prefill_threshold,
    )
    # Answers first: who came during a long prompt would get no token before that prompt is whole.
    scheduler.running.sort(key=_turn)
    prompts = [request for request in scheduler.running if _in_prompt(request)]
    each = _tokens_of_an_answer(scheduler)
    answers = sum(max(each, 1 + len(it.spec_token_ids)) for it in scheduler.running if not _in_prompt(it))
    scheduler.max_num_scheduled_tokens = min(before[0], tokens + answers)
    room = len(scheduler.running) < scheduler.max_num_active_reqs and not before[1]
    waiting = scheduler.waiting.peek_request() if room and scheduler.waiting else None
    left = _budget(scheduler).leaves(waiting, tokens, prompts[0]) if waiting and prompts else 0
    if left:
        config.long_prefill_token_threshold = max(1, (tokens - left) // len(prompts))
        scheduler.adaptive_long_prefill_threshold = False
    try:
        yield
    finally:
        scheduler.max_num_scheduled_tokens = before[0]
        config.long_prefill_token_threshold, scheduler.adaptive_long_prefill_threshold = before[1:]


def _budget(scheduler: Any) -> PromptBudget:
    budget: PromptBudget | None = getattr(scheduler, "loradock_prompt_budget", None)
    if budget is None:
        target = os.environ.get(VARIABLE) or "0"
        budget = PromptBudget(None if target == "auto" else float(target), StepCosts(tiles=_widens()))
        scheduler.loradock_prompt_budget = budget
    return budget


def _widens() -> bool:
    """Whether our kernels compute a step, and multiply prompts by tiles."""
    return os.environ.get(KERNELS, "auto") == "auto" and "AMX" in instructions()


def _in_prompt(request: Any) -> bool:
    return bool(request.num_computed_tokens < request.num_prompt_tokens)


def _turn(request: Any) -> tuple[float, ...]:
    """Smaller for who is computed earlier: answers as they stand, then prompts in the order of vLLM's queue."""
    return (math.inf, request.priority, request.arrival_time) if _in_prompt(request) else (-math.inf,)


def _rest(request: Any) -> Piece:
    return Piece(request.num_computed_tokens, request.num_prompt_tokens - request.num_computed_tokens)


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
