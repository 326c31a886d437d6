"""Answers to one prompt are weighed as if each were read behind it anew, whatever a model keeps of a prompt."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from optimize.checkpoint.model import adapted, opened
from optimize.steps.tune.reading import likelihoods, read
from tests.support import families

ASKED = [
    ([5, 17, 30, 41, 9, 12, 77, 8, 60, 33, 21, 70], [[4], [10, 11, 12], [7, 8, 9, 20, 21, 22, 23, 24, 25, 26]]),
    ([61, 6, 7], [[50, 3], [4]]),
    ([44, 5, 90, 31, 20], [[9], [10], [11]]),
]


def counted(model: torch.nn.Module) -> list[int]:
    """Tokens of each call, as they come."""
    calls: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda _, given, out: calls.append(out[..., 0].numel()))
    return calls


# One of each kind of what is kept of a prompt.
NAMES = ("Llama", "Gemma 3", "DeepSeek V2", "GPT-2", "Qwen3-Next", "Falcon-H1", "Mamba 2", "LFM2")
# Whose states of a prompt no two answers can share.
STATES = ("Qwen3-Next", "Falcon-H1", "Mamba 2", "LFM2")


@pytest.mark.parametrize("name", NAMES)
def test_answers_behind_a_prompt_that_is_read_once_are_as_likely_as_alone(name: str, tmp_path: Path) -> None:
    base = families.written(name, tmp_path / "base")
    model = opened(base).float()
    calls = counted(model)
    with adapted(model, families.adapter(base, tmp_path / "adapter")) as both:
        found = likelihoods(both, ASKED)
        behind, calls[:] = [*calls], []
        alone = []
        for prompt, answers in ASKED:
            rows = read(both, [[*prompt, *answer] for answer in answers])
            alone.append([float(row.logps[len(prompt) - 1 :].mean()) for row in rows])
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)
    assert (behind == [3 * 12, 8 * 9]) == (name not in STATES)
