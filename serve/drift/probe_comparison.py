"""A version's answers to the probe prompts, compared with its first ones: arrays for its baseline, and one ratio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from serve.engine.effect_probe import Logprobs, effect

# Nats by which the base's own answers differ from batch to batch, where the engine was not measured to differ by more.
PROBE_NOISE = 0.04


def probe_arrays(answers: Sequence[Logprobs], noise: float) -> dict[str, NDArray]:
    """The answers and the noise of the engine as they are kept in the baseline: tokens, logprobs, noise."""
    count = min(len(logprobs) for logprobs in answers)
    rows = [sorted(logprobs.items(), key=lambda item: -item[1])[:count] for logprobs in answers]
    return {
        "tokens": np.array([[token for token, _ in row] for row in rows], np.int64),
        "logprobs": np.array([[logprob for _, logprob in row] for row in rows], np.float64),
        "noise": np.array(max(noise, PROBE_NOISE)),
    }


def has_reference(kept: Mapping[str, NDArray], answers: Sequence[Logprobs]) -> bool:
    """Whether the baseline holds answers to as many prompts."""
    return "logprobs" in kept and len(kept["logprobs"]) == len(answers)


def noise_ratio(kept: Mapping[str, NDArray], answers: Sequence[Logprobs], noise: float) -> float:
    """How far the answers moved from the kept ones, in multiples of the larger noise: the kept one, or today's."""
    pairs = zip(kept["tokens"].tolist(), kept["logprobs"].tolist(), strict=True)
    reference = [dict(zip(tokens, logprobs, strict=True)) for tokens, logprobs in pairs]
    return effect(reference, answers) / max(float(kept["noise"]), noise)
