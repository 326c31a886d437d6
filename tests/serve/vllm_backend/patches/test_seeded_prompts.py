"""A request with a seed whose prompt is computed in parts draws what it would have drawn of a whole one."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from serve.vllm_backend.patches import seeded_prompts


def seeded(number):
    generator = torch.Generator()
    generator.manual_seed(number)
    return generator


def draw(generator):
    return torch.rand(4, generator=generator).tolist()


@pytest.fixture
def runner():
    """A step of three requests: a whole prompt, one in parts, and one in parts without a seed."""
    batch = SimpleNamespace(num_reqs=3, generators={0: seeded(1), 1: seeded(2)})
    mask = SimpleNamespace(np=np.array([False, True, True, True]))
    return SimpleNamespace(input_batch=batch, discard_request_mask=mask)


def test_vllm_still_turns_generators_back_by_an_offset_that_a_cpu_has_not():
    with pytest.raises(RuntimeError, match="offset"):
        seeded(1).get_offset()
    names = GPUModelRunner._bookkeeping_sync.__code__.co_names
    assert {"set_offset", "discard_request_mask", "generators"} <= set(names)


def test_a_token_that_is_thrown_away_takes_nothing_from_its_seed(runner):
    def step(runner):
        return [draw(runner.input_batch.generators[row]) for row in (0, 1)]

    for _ in range(3):
        seeded_prompts.sample(step, runner)
    assert draw(runner.input_batch.generators[1]) == draw(seeded(2))
    whole = seeded(1)
    for _ in range(3):
        draw(whole)
    assert draw(runner.input_batch.generators[0]) == draw(whole)


def test_the_turning_back_sees_no_generator_of_a_prompt_in_parts_and_all_are_there_afterwards(runner):
    before = dict(runner.input_batch.generators)
    seen = seeded_prompts.bookkeeping_sync(lambda runner: dict(runner.input_batch.generators), runner)
    assert (list(seen), runner.input_batch.generators) == ([0], before)

    def fails(runner):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        seeded_prompts.bookkeeping_sync(fails, runner)
    assert runner.input_batch.generators == before


def test_without_seeds_nothing_is_looked_at():
    runner = SimpleNamespace(input_batch=SimpleNamespace(num_reqs=3, generators={}))
    assert seeded_prompts.sample(lambda runner: "drawn", runner) == "drawn"
