"""vLLM's scheduler takes our drafts, and a sequence says what it would have said without them."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from serve.cpu_kernels import prompt_budget, speculation, verification
from serve.cpu_kernels.drafts import MOST_IN_STEP
from serve.vllm_backend.patches import classes
from serve.vllm_backend.patches.applying import apply
from serve.vllm_backend.patches.table import named
from tests.serve.cpu_kernels.test_prompt_budget import real_scheduler

if not current_platform.is_cpu():
    pytest.skip("drafts are a CPU's alone", allow_module_level=True)

PHRASE = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]


def following(tokens: list[int]) -> int:
    """What a pretended model says: it copies its prompt's first tokens, over and over, and errs now and then."""
    place = len(tokens) % len(PHRASE)
    return 7 if random.Random(len(tokens)).random() < 0.05 else PHRASE[place]


class Clock:
    """The time of steps that take what they should: nothing here is computed, so real time says what else ran."""

    TOKEN = 0.1  # of what a step of one token takes

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def computed(self, tokens: int) -> None:
        self.now += 1 + self.TOKEN * (tokens - 1)


@pytest.fixture
def scheduler(tmp_path, monkeypatch) -> Scheduler:
    """vLLM's own with our part in it, before a model that verifies drafts."""
    monkeypatch.setattr(classes, "_methods", {classes.SCHEDULER: [], classes.RUNNER: []})
    apply(named("speculation"))
    made = real_scheduler(tmp_path, "priority")
    monkeypatch.setattr(verification, "_refusal", "")
    made.clock = Clock()
    made.loradock_speculation = speculation.Speculation(made.clock)
    return made


def asked(name: str, adapter: str = "", copies: int = 2, **params) -> Request:
    lora = LoRARequest(adapter, 1, "/nowhere") if adapter else None
    params = SamplingParams(**{"max_tokens": 60, "ignore_eos": True, "temperature": 0, **params})
    return Request(name, PHRASE * copies, params, None, lora_request=lora)


def answered(scheduler: Scheduler, *requests: Request, together: int = 100) -> tuple[dict[str, list[int]], list, dict]:
    """Everything until all have ended: each one's tokens, the drafts of each step, and vLLM's counts of them."""
    for request in requests:
        scheduler.add_request(request)
    said, steps, counts = {request.request_id: [] for request in requests}, [], {}
    while scheduler.requests:
        output = scheduler.schedule()
        drafts = output.scheduled_spec_decode_tokens
        steps.append({name: len(each) for name, each in drafts.items()})
        scheduler.clock.computed(output.total_num_scheduled_tokens)
        names = list(output.num_scheduled_tokens)
        sampled = []
        for name in names:
            request = scheduler.requests[name]
            known = list(request.all_token_ids)
            new = []
            if request.num_computed_tokens - len(drafts.get(name, ())) >= len(known):
                for draft in [*drafts.get(name, ()), None]:
                    new.append(following(known + new))
                    if new[-1] != draft:
                        break
            sampled.append(new)
        made = ModelRunnerOutput(
            req_ids=names, req_id_to_index={name: i for i, name in enumerate(names)}, sampled_token_ids=sampled
        )
        for outputs in scheduler.update_from_output(output, made).values():
            for each in outputs.outputs:
                said[each.request_id] += each.new_token_ids
                if each.spec_decode_metrics is not None:
                    counts[each.request_id] = each.spec_decode_metrics
    return said, steps, counts


def test_an_answer_that_copies_takes_fewer_steps_and_is_the_same(scheduler, monkeypatch):
    said, steps, counts = answered(scheduler, asked("a"))
    assert len(said["a"]) == 60 and len(steps) < 30
    accepted = sum(number * times for number, times in enumerate(counts["a"].histogram))
    drafted = sum(step.get("a", 0) for step in steps)
    assert counts["a"].num_draft_tokens == drafted
    # Every step but the first, which reads the prompt, says a token of its own; the last one's may be behind the end.
    assert len(steps) + accepted >= 60 and accepted <= drafted
    monkeypatch.setattr(verification, "_refusal", "not today")
    alone, plain, uncounted = answered(scheduler, asked("a"))
    assert alone == said and len(plain) == 60 and not any(plain) and not uncounted


def test_many_at_once_draft_less_and_never_more_than_a_step_takes(scheduler):
    said, steps, _ = answered(scheduler, *(asked(str(number), adapter=f"tone{number % 2}") for number in range(12)))
    assert all(tokens == said["0"] for tokens in said.values())
    assert any(steps) and max(sum(step.values()) for step in steps) <= MOST_IN_STEP


def test_drafts_push_no_answer_out_of_the_cache(scheduler, monkeypatch):
    monkeypatch.setattr(scheduler.kv_cache_manager.block_pool, "get_num_free_blocks", lambda: 3)
    _, steps, _ = answered(scheduler, asked("a"), asked("b"))
    assert not any(steps)


def test_drafts_push_no_answer_out_of_a_step(scheduler, monkeypatch):
    monkeypatch.setattr(scheduler, "max_num_scheduled_tokens", 3)
    said, steps, _ = answered(scheduler, asked("a", min_tokens=60), asked("b", max_tokens=50))
    assert [len(tokens) for tokens in said.values()] == [60, 50]
    assert any("b" in step for step in steps) and max(sum(step.values()) for step in steps) <= 2
    reading = -(-len(PHRASE) * 2 * 2 // 3)
    assert len(steps) <= reading + 60, "a has a token in every step"


def test_nothing_is_drafted_behind_the_last_token_that_a_request_may_have(scheduler):
    said, steps, _ = answered(scheduler, asked("a", max_tokens=3))
    assert len(said["a"]) == 3 and max(step.get("a", 0) for step in steps) <= 1


def test_a_request_that_ends_at_a_token_among_its_drafts_ends_there(scheduler):
    said, _, _ = answered(scheduler, asked("a", ignore_eos=False, stop_token_ids=[9]))
    assert said["a"].index(9) == len(said["a"]) - 1


@pytest.mark.parametrize(
    "params",
    [
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
        {"repetition_penalty": 1.1},
        {"min_p": 0.1, "temperature": 1.0},
        {"stop": ["end"]},
        {"logit_bias": {3: 1.0}},
        {"allowed_token_ids": PHRASE},
        {"bad_words": ["no"]},
        {"structured_outputs": StructuredOutputsParams(json={"type": "object"})},
        {"logprob_token_ids": [3], "logprobs": 1},
        {"thinking_token_budget": 4},
    ],
    ids=lambda params: next(iter(params)),
)
def test_a_request_whose_tokens_are_more_than_their_logits_goes_without_drafts(params):
    assert not speculation.drafts_fit(asked("a", **params))


@pytest.mark.parametrize(
    "params",
    [{}, {"temperature": 0.7, "seed": 3, "top_p": 0.9, "top_k": 40}, {"logprobs": 5}, {"prompt_logprobs": 2}],
    ids=str,
)
def test_all_others_have_drafts(params):
    assert speculation.drafts_fit(asked("a", **params))


def test_with_min_tokens_drafts_begin_when_those_are_said(scheduler):
    _, steps, _ = answered(scheduler, asked("a", min_tokens=20))
    assert not any(steps[:20]) and any(steps[20:])


def test_drafts_of_a_step_that_did_not_come_to_their_request_are_forgotten(scheduler):
    scheduler.add_request(asked("a"))
    scheduler.schedule()
    (request,) = scheduler.running
    request.num_computed_tokens = 5  # as of one whose prompt is read in parts
    request.spec_token_ids = [1, 2]
    assert not scheduler.schedule().scheduled_spec_decode_tokens


def test_drafts_are_no_tokens_of_a_prompt_and_take_no_room_of_prompts(scheduler):
    answered(scheduler, asked("a"))
    scheduler.add_request(asked("b"))
    scheduler.schedule()
    scheduler.running[0].spec_token_ids = [1, 2, 3]
    scheduler.running[0].num_computed_tokens = scheduler.running[0].num_prompt_tokens
    with prompt_budget._limited(scheduler, 100):
        assert scheduler.max_num_scheduled_tokens == 104


def test_why_nothing_is_drafted_is_said_once(scheduler, monkeypatch, caplog):
    monkeypatch.setattr(verification, "_refusal", verification.NOT_HERE)
    with caplog.at_level("WARNING", logger="loradock"):
        answered(scheduler, asked("a"), asked("b"))
    assert [record.getMessage() for record in caplog.records] == [f"nothing is drafted: {verification.NOT_HERE}"]
