"""The plan is made from headers, by the rules beside each step."""

from __future__ import annotations

import subprocess
import sys

import pytest

from optimize.errors import Refused
from optimize.options import STEPS
from optimize.pipeline import plan
from optimize.recipe import load


def test_a_plan_needs_no_torch():
    check = "import sys, optimize.pipeline.plan; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_every_step_has_its_rules():
    assert set(plan.RULES) == set(STEPS.values())


@pytest.mark.parametrize(
    ("step", "what"),
    [
        ("prune: {layers: 1}", "drop 1 layers by greedy choice"),
        ("prune: {pattern: 2:4}", "2:4 zeros by sparsegpt"),
        ("heal: {rank: 4}", "least squares, then distil the original, LoRA of rank 4"),
        ("quantize: {scheme: w4a16, budget: 0.02}", "w4a16, gptq, sensitive layers keep more bits until perplexity"),
        ("quantize: {scheme: w4a16, bits: 5}", "w4a16, gptq, sensitive layers keep more bits as long as a"),
    ],
)
def test_a_step_says_what_it_will_do_and_what_it_needs(step, what, written, tmp_path):
    recipe = load(written(f"steps: [{{{step}}}]"))
    first, *_, last = plan.made(recipe, plan.Path(recipe.model), {}, tmp_path / "out", 10**12).steps
    assert first.what.startswith(what) and min(first.memory, first.disk, first.seconds) > 0
    assert (last.kind, last.what) == ("export", "vllm directory, manifest, report")


def test_fewer_bits_than_the_groups_scales_leave_room_for_are_refused(written, tmp_path):
    recipe = load(written("steps: [{quantize: {scheme: w4a16, group: 32, bits: 4.3}}]"))
    with pytest.raises(Refused, match=r"groups of 32 take 4\.5 bits a weight, and `bits` is 4\.3"):
        plan.made(recipe, plan.Path(recipe.model), {}, tmp_path / "out", 10**12)
