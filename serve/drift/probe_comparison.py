"""A version's answers to the probe prompts, compared with its first ones: arrays for its baseline, and one ratio.

The same bytes answer otherwise when the engine computes otherwise: with other kernels, threads or releases. The base's
answers to the same prompts, kept beside the version's, tell this from a version that changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serve.engine.effect_probe import Logprobs, effect

# Nats by which the base's own answers differ from batch to batch, where the engine was not measured to differ by more.
PROBE_NOISE = 0.04
# An adapter may amplify what the base moves by. SmolLM2-135M on a CPU, with and without our LoRA kernels, 25 November
# 2026: the base moved by 0.053 nats, a faint adapter by 0.053, a strong one by 0.092; from start to start by nothing.
AMPLIFIED = 2.0
# The noise of a reference that has no answers of the base beside it.
UNKNOWN_KERNELS_NOISE = 0.1


@dataclass(frozen=True, slots=True)
class ProbeAnswers:
    """What a version, and the base of the same engine, answered; `noise` of that engine in nats."""

    version: Sequence[Logprobs]
    base: Sequence[Logprobs]
    noise: float = 0.0


def probe_arrays(answers: ProbeAnswers, noise: float) -> dict[str, NDArray]:
    """The answers as they are kept in the baseline."""
    arrays = {**_arrays(answers.version), "noise": np.array(max(noise, PROBE_NOISE))}
    return arrays | {f"base_{name}": array for name, array in _arrays(answers.base).items()}


def has_reference(kept: Mapping[str, NDArray], answers: ProbeAnswers) -> bool:
    """Whether the baseline holds answers to as many prompts."""
    return "logprobs" in kept and len(kept["logprobs"]) == len(answers.version)


def noise_ratio(kept: Mapping[str, NDArray], answers: ProbeAnswers, noise: float) -> float:
    """How far the answers moved from the kept ones, in multiples of the noise."""
    moved = effect(_answers(kept, ""), answers.version)
    if "base_logprobs" in kept and len(kept["base_logprobs"]) == len(answers.base):
        engines = AMPLIFIED * effect(_answers(kept, "base_"), answers.base)
    else:
        engines = UNKNOWN_KERNELS_NOISE
    return moved / max(float(kept["noise"]), noise, engines)


def _arrays(answers: Sequence[Logprobs]) -> dict[str, NDArray]:
    count = min(len(logprobs) for logprobs in answers)
    rows = [sorted(logprobs.items(), key=lambda item: -item[1])[:count] for logprobs in answers]
    return {
        "tokens": np.array([[token for token, _ in row] for row in rows], np.int64),
        "logprobs": np.array([[logprob for _, logprob in row] for row in rows], np.float64),
    }


def _answers(kept: Mapping[str, NDArray], prefix: str) -> list[Logprobs]:
    pairs = zip(kept[f"{prefix}tokens"].tolist(), kept[f"{prefix}logprobs"].tolist(), strict=True)
    return [dict(zip(tokens, logprobs, strict=True)) for tokens, logprobs in pairs]
