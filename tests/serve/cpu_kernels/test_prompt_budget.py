"""Prompts of others take no more of a step than a running answer can wait for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.config import CacheConfig, DeviceConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.platforms import current_platform
from vllm.v1.core.sched.request_queue import FCFSRequestQueue
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from serve.cpu_kernels import prompt_budget
from serve.cpu_kernels.prompt_budget import AGAIN, NOTICED, ROWS, SLOWER, UNNOTICED, VARIABLE, _in_prompt
from serve.cpu_kernels.step_costs import FIRST, LEAST, NEEDED, Piece, StepCosts
from serve.vllm_backend.patches.applying import apply
from serve.vllm_backend.patches.table import named
from tests.support import tiny

if not current_platform.is_cpu():
    pytest.skip("a step's share of prompts is bounded on a CPU alone", allow_module_level=True)

MOST = 2048


def request(computed, prompt=1000, prompt_logprobs=None, arrived=0.0):
    params = SimpleNamespace(prompt_logprobs=prompt_logprobs)
    return SimpleNamespace(
        sampling_params=params,
        num_computed_tokens=computed,
        num_prompt_tokens=prompt,
        priority=0,
        arrival_time=arrived,
        request_id=f"{prompt} tokens, {arrived}",
        spec_token_ids=[],
    )


class Machine:
    """A scheduler whose steps take a second for each 1,000 tokens of prompts, and 10 ms for each answer.

    Prompts have no end, so that every step takes what it may.
    """

    def __init__(self, monkeypatch, running, waiting=(), target="0.25", drafts=0):
        monkeypatch.setenv(VARIABLE, target)
        self.scheduler = SimpleNamespace(
            max_num_scheduled_tokens=MOST,
            max_num_active_reqs=32,
            requests=dict(enumerate([*running, *waiting])),
            running=list(running),
            waiting=FCFSRequestQueue(waiting),
            scheduler_config=SimpleNamespace(
                long_prefill_token_threshold=0, enable_chunked_prefill=True, disable_chunked_mm_input=False
            ),
            adaptive_long_prefill_threshold=True,
            num_spec_tokens=drafts,
        )
        self.now, self.seconds, self.budgets, self.thresholds = 0.0, 0.0, [], []
        self.costs = prompt_budget._budget(self.scheduler).costs
        self.costs.clock = lambda: self.now

    def step(self, prompts=None):
        """One step, with as many tokens of prompts as it may take, or so many; how many it was allowed in all."""

        def original(scheduler, throttle):
            self.budgets.append(scheduler.max_num_scheduled_tokens)
            self.thresholds.append(scheduler.scheduler_config.long_prefill_token_threshold)
            names = {id(one): name for name, one in scheduler.requests.items()}
            answers = [names[id(one)] for one in scheduler.running if not _in_prompt(one)]
            scheduled = dict.fromkeys(answers, 1)
            tokens = self.budgets[-1] - len(answers) if prompts is None else prompts
            asked = [name for name, one in scheduler.requests.items() if _in_prompt(one)]
            if tokens and asked:
                scheduled[asked[0]] = tokens
                scheduler.requests[asked[0]].num_prompt_tokens += tokens
            for name, count in scheduled.items():
                scheduler.requests[name].num_computed_tokens += count
            self.seconds = 0.01 * len(answers) + 0.001 * (tokens if asked else 0)
            return SimpleNamespace(num_scheduled_tokens=scheduled)

        output = prompt_budget.schedule(original, self.scheduler)
        self.now += self.seconds
        prompt_budget.update_from_output(lambda scheduler, output, result: None, self.scheduler, output, None)
        assert self.scheduler.max_num_scheduled_tokens == MOST
        assert self.scheduler.scheduler_config.long_prefill_token_threshold == 0
        assert self.scheduler.adaptive_long_prefill_threshold
        return self.budgets[-1]


def test_beside_a_running_answer_a_step_takes_as_many_tokens_of_prompts_as_the_machine_reads_in_that_time(monkeypatch):
    machine = Machine(monkeypatch, [request(1000), request(0)])
    assert machine.step() == FIRST + 1
    for _ in range(30):
        machine.step()
    assert machine.step() - 1 == pytest.approx(250, rel=0.06)


@pytest.mark.parametrize("answers", [1, 4, 16])
def test_by_itself_a_step_takes_at_most_three_times_what_its_answers_take_alone(monkeypatch, answers):
    machine = Machine(monkeypatch, [*(request(1000) for _ in range(answers)), request(0)], target="auto")
    times = []
    for _ in range(300):
        before = machine.now
        machine.step()
        times.append(machine.now - before)
    alone = 0.01 * answers
    assert times[0] == alone, "the answers are measured first"
    assert sum(time == pytest.approx(alone) for time in times) < 10
    settled = [time for time in times[40:] if time > 1.01 * alone]
    wanted = max(UNNOTICED, SLOWER * alone, alone + LEAST / 1000)
    assert max(settled) < 1.1 * wanted and sum(settled) / len(settled) == pytest.approx(wanted, rel=0.05)


@pytest.mark.parametrize(
    ("answers", "prompts", "seconds"), [(1, 15, 0.6), (4, 12, 0.336), (2, 60, NOTICED), (8, 8, 0.224)]
)
def test_a_step_takes_longer_where_more_wait_than_are_answered(monkeypatch, answers, prompts, seconds):
    running = [*(request(1000) for _ in range(answers)), request(0)]
    machine = Machine(monkeypatch, running, [request(0) for _ in range(prompts - 1)], target="auto")
    machine.scheduler.max_num_active_reqs = 64
    for _ in range(60):
        machine.step()
    assert machine.seconds == pytest.approx(seconds, rel=0.05)


def test_who_cannot_begin_makes_no_step_longer(monkeypatch):
    machine = Machine(monkeypatch, [*[request(1000)] * 3, request(0)], [request(0)] * 60, target="auto")
    machine.scheduler.max_num_active_reqs = 4
    for _ in range(60):
        machine.step()
    assert machine.seconds == pytest.approx(SLOWER * 0.03, rel=0.05)


def test_a_prompt_gets_its_tokens_also_while_answers_cannot_be_measured(monkeypatch):
    machine = Machine(monkeypatch, [request(1000), request(0)], target="auto")
    monkeypatch.setattr(StepCosts, "unknown", lambda costs, answers: True)
    assert [machine.step() > LEAST for _ in range(6)] == [False, True] * 3


def test_a_step_of_answers_alone_is_no_cost_of_prompts(monkeypatch):
    machine = Machine(monkeypatch, [request(1000)])
    for _ in range(40):
        machine.step(prompts=0)
    assert machine.costs.token is None and machine.costs.alone(1) == pytest.approx(0.01)
    machine.scheduler.requests["prompt"] = request(0)
    for _ in range(40):
        machine.step(prompts=100)
    assert machine.costs.token == pytest.approx(0.001, rel=0.1)


def test_a_machine_that_is_too_slow_for_the_target_still_goes_on(monkeypatch):
    machine = Machine(monkeypatch, [request(1000), request(0)], target="0.001")
    for _ in range(5):
        machine.step()
    assert machine.step() == LEAST + 1


@pytest.mark.parametrize(
    ("running", "target"),
    [([request(0), request(512)], "0.25"), ([], "auto"), ([request(0)], "auto"), ([request(1000)], "0")],
)
def test_where_no_answer_waits_and_where_nobody_asked_for_it_a_step_is_vllms(monkeypatch, running, target):
    machine = Machine(monkeypatch, running, target=target)
    machine.step(prompts=100)
    assert machine.step(prompts=100) == MOST


def test_drafted_tokens_of_an_answer_are_no_prompt_and_take_no_room_of_prompts(monkeypatch):
    machine = Machine(monkeypatch, [request(1000) for _ in range(20)], drafts=3)
    for one in machine.scheduler.running:
        one.num_computed_tokens += 4
    output = SimpleNamespace(num_scheduled_tokens=dict.fromkeys(range(20), 4))
    prompt_budget.schedule(lambda scheduler, throttle: output, machine.scheduler)
    prompt_budget.update_from_output(lambda *step: None, machine.scheduler, output, None)
    assert machine.costs.token is None
    assert machine.step() == FIRST + 4 * 20


def test_what_answers_take_is_measured_in_few_steps(monkeypatch):
    machine = Machine(monkeypatch, [request(1000), request(0)], target="auto")
    waited = [machine.step() == 1 for _ in range(2 * NEEDED + 2)]
    assert waited == [True, False] * NEEDED + [False, False]


@pytest.mark.parametrize(
    ("wants", "computed", "expected"),
    [(20, 0, ROWS), (20, 900, ROWS), (20, 1000, MOST), (None, 0, MOST)],
)
@pytest.mark.parametrize("where", ["running", "waiting"])
def test_a_step_takes_less_of_prompts_while_a_prompt_wants_logprobs(monkeypatch, wants, computed, expected, where):
    queues = {"running": [request(10)], "waiting": []}
    queues[where].append(request(computed, prompt_logprobs=wants))
    machine = Machine(monkeypatch, queues["running"], queues["waiting"], target="0")
    assert machine.step() == expected


@pytest.mark.parametrize(
    ("length", "arrived", "prompts", "left"),
    [
        (FIRST // 4, 9.0, 1, FIRST * 3 // 4),
        (FIRST // 4 + 1, 9.0, 1, 0),
        (700, 0.5, 1, FIRST // 2),
        (700, 0.5, 2, FIRST // 4),
        (700, 9.0, 2, 0),
    ],
)
def test_long_prompts_leave_a_part_of_the_step_to_who_is_short_or_before_them(
    monkeypatch, length, arrived, prompts, left
):
    running = [request(1000), *(request(300, prompt=5000, arrived=1.0 + i) for i in range(prompts))]
    machine = Machine(monkeypatch, running, [request(0, prompt=length, arrived=arrived)])
    machine.step()
    assert machine.thresholds == [left]


def test_who_does_not_take_what_was_left_is_asked_again_only_now_and_then(monkeypatch):
    """Its adapter has no slot, or its keys no room: prompts that are being computed do not wait for that."""
    machine = Machine(monkeypatch, [request(1000), request(0, arrived=1.0)], [request(0, prompt=10)])
    for _ in range(2 * AGAIN + 1):
        machine.step()
    left = [at for at, threshold in enumerate(machine.thresholds) if threshold]
    assert left == [0, AGAIN, 2 * AGAIN]
    machine.scheduler.waiting.appendleft(request(0, prompt=11))
    machine.step()
    assert machine.thresholds[-1]


def test_nothing_is_left_to_who_has_no_place(monkeypatch):
    machine = Machine(monkeypatch, [request(1000), request(300, arrived=1.0)], [request(0, prompt=10)])
    machine.scheduler.max_num_active_reqs = 2
    machine.step()
    assert machine.thresholds == [0]


def test_a_short_prompt_is_before_a_long_one_that_came_a_little_earlier_and_no_prompt_waits_for_ever(monkeypatch):
    machine = Machine(monkeypatch, [request(1000)])
    machine.costs.token = 0.001
    arrivals = {}
    for name, arrived, length in (("long", 0.0, 2000), ("short", 1.0, 50), ("late", 3.0, 50)):
        coming = SimpleNamespace(arrival_time=arrived, num_prompt_tokens=length)
        prompt_budget.add_request(lambda scheduler, taken: None, machine.scheduler, coming)
        arrivals[name] = coming.arrival_time
    assert sorted(arrivals, key=arrivals.__getitem__) == ["short", "long", "late"]


def real_scheduler(folder: Path, policy: str, **options: bool) -> Scheduler:
    """vLLM's own, for a small model, with our part in it."""
    apply(named("prompt-budget"))
    context = 2048
    model = ModelConfig(
        model=str(tiny.model(folder)), skip_tokenizer_init=True, dtype="bfloat16", max_model_len=context
    )
    scheduling = SchedulerConfig(
        max_num_seqs=16,
        max_num_batched_tokens=MOST,
        max_model_len=context,
        is_encoder_decoder=False,
        policy=policy,
        async_scheduling=False,
        **options,
    )
    cache = CacheConfig(block_size=16, enable_prefix_caching=False)
    config = VllmConfig(model, scheduler_config=scheduling, cache_config=cache, device_config=DeviceConfig("cpu"))
    cache.num_gpu_blocks = 1000
    layer = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=8, dtype=torch.bfloat16)
    blocks = KVCacheConfig(num_blocks=1000, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], layer)])
    return config.scheduler_config.get_scheduler_cls()(config, blocks, StructuredOutputManager(config), block_size=16)


def asked(name: str, length: int, prompt_logprobs: int | None = None, tokens: int = 100) -> Request:
    params = SamplingParams(max_tokens=tokens, ignore_eos=True, prompt_logprobs=prompt_logprobs)
    return Request(name, [1] * length, params, None)


def stepped(scheduler: Scheduler, now: list[float]) -> dict[str, int]:
    """One step, in which every request whose prompt is whole gets a token; how many tokens it computed of each.

    It takes a millisecond for each of them.
    """
    output = scheduler.schedule()
    names = list(output.num_scheduled_tokens)
    whole = [[] if _in_prompt(scheduler.requests[name]) else [1] for name in names]
    made = ModelRunnerOutput(
        req_ids=names, req_id_to_index={name: i for i, name in enumerate(names)}, sampled_token_ids=whole
    )
    now[0] += 0.001 * output.total_num_scheduled_tokens
    scheduler.update_from_output(output, made)
    return output.num_scheduled_tokens


@pytest.mark.parametrize("policy", ["priority", "fcfs"])
@pytest.mark.parametrize("prompt_logprobs", [None, 20])
def test_no_answer_that_has_begun_waits_for_the_prompt_of_another(tmp_path, monkeypatch, policy, prompt_logprobs):
    monkeypatch.setenv(VARIABLE, "0.25")
    scheduler = real_scheduler(tmp_path, policy)
    costs, now = prompt_budget._budget(scheduler).costs, [0.0]
    costs.clock = lambda: now[0]
    costs._learn(1.0, 0.0, [Piece(0, 1000)])
    scheduler.add_request(asked("first", 20))
    stepped(scheduler, now)
    scheduler.add_request(asked("long", 1900, prompt_logprobs))
    stepped(scheduler, now)
    scheduler.add_request(asked("second", 20))
    assert stepped(scheduler, now)["second"] == 20, "it does not wait for the whole of the long one"
    steps = 0
    while _in_prompt(scheduler.requests["long"]):
        computed = stepped(scheduler, now)
        assert computed["first"] == 1 and computed["second"] == 1 and 0 < computed["long"] <= 256
        steps += 1
    assert steps > 3


def test_a_prompt_passes_a_longer_one_that_is_being_computed_and_both_come_to_their_end(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, "auto")
    scheduler = real_scheduler(tmp_path, "priority")
    costs, now = prompt_budget._budget(scheduler).costs, [0.0]
    costs.clock = lambda: now[0]
    costs._learn(1.0, 0.0, [Piece(0, 1000)])
    scheduler.add_request(asked("answer", 20, tokens=2000))
    stepped(scheduler, now)
    for name, length, arrival in (("long", 1900, 0.0), ("middle", 600, 0.5), ("short", 200, 0.6), ("last", 600, 2.0)):
        coming = asked(name, length, tokens=2000)
        coming.arrival_time = arrival
        scheduler.add_request(coming)
        for _ in range(4):
            stepped(scheduler, now)
    ended: list[str] = []
    while len(ended) < 5:
        ended += [it for it in scheduler.requests if it not in ended and not _in_prompt(scheduler.requests[it])]
        assert stepped(scheduler, now)["answer"] == 1
    assert ended == ["answer", "short", "middle", "long", "last"]


@pytest.mark.parametrize("option", [{"enable_chunked_prefill": False}, {"disable_chunked_mm_input": True}])
def test_where_prompts_are_not_cut_a_long_one_does_not_wait_for_the_end_of_all_answers(tmp_path, monkeypatch, option):
    monkeypatch.setenv(VARIABLE, "0.25")
    scheduler, now = real_scheduler(tmp_path, "priority", **option), [0.0]
    scheduler.add_request(asked("first", 20))
    stepped(scheduler, now)
    scheduler.add_request(asked("long", 1900, 20))
    assert stepped(scheduler, now) == {"first": 1, "long": 1900}
