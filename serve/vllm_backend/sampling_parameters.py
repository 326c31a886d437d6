"""What a request asked of vLLM's sampler, in the few numbers that its answer's length and words depend on."""

from __future__ import annotations

import hashlib

from vllm.sampling_params import SamplingParams

from serve.asgi.exchange import Parameters

# What shapes an answer beside length, temperature and structure. `n` and `seed` do not.
OTHERS = (
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "top_p",
    "top_k",
    "min_p",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "min_tokens",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "thinking_token_budget",
)
_DEFAULTS = SamplingParams()
_USUAL = tuple(getattr(_DEFAULTS, name) for name in OTHERS)


def parameters_of(params: SamplingParams | None, tools: bool = False) -> Parameters | None:
    """None for what generates nothing."""
    if params is None:
        return None
    unusual = [
        (name, value) for name, usual in zip(OTHERS, _USUAL, strict=True) if (value := getattr(params, name)) != usual
    ]
    return Parameters(
        max_tokens=params.max_tokens or 0,
        temperature=float(params.temperature),
        constrained=params.structured_outputs is not None,
        tools=tools,
        others=hashlib.blake2b(repr(unusual).encode(), digest_size=4).hexdigest() if unusual else "",
    )
