"""Which way this process's steps went: in one call, or layer by layer and why."""

from __future__ import annotations

from collections import Counter

# Why a step goes layer by layer: first what is true of a model, then of single steps.
REASONS = {
    "model": "what the model computes is not known",
    "size": "a size of the model is not known",
    "weights": "the format of the model's weights or of the KV cache is not known",
    "norm": "a norm of the model is not known",
    "activation": "the model's activation is not known",
    "rope": "the model's rotation is not known",
    "attention": "the attention is not known",
    "output": "the output layer is not known",
    "adapters": "the adapters are vLLM's own path's",
    "engine": "the engine is spread, has a speculative_config, hands its KV cache over or generates nothing",
    "adapter": "an adapter came in between",
    "dora": "an adapter has magnitudes (DoRA), and a layer is not one of our kernels'",
    "cache": "the KV cache lies in another way",
    "embeddings": "the prompt is embeddings and not tokens",
}

_steps: Counter[tuple[str, str]] = Counter()


def fused() -> None:
    _steps["fused", ""] += 1


def layers(reason: str) -> int:
    """How many went this way for that reason, this one included."""
    _steps["layers", reason] += 1
    return _steps["layers", reason]


def steps() -> list[tuple[str, str, int]]:
    """How many went which way: path, reason and count."""
    return [(path, reason, count) for (path, reason), count in _steps.items()]
