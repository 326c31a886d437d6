"""Attention over a row of several sequences, each alone.

torch's kernel for CPUs takes a mask, and computes what the mask hides too: on rows of short examples most of its work.
So each sequence's queries meet its own keys, without a mask where that is plain causal attention.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

NAME, REPLACED = "loradock_packed", "sdpa"


def register() -> str:
    """The name under which transformers knows it; it wants the mask of what it replaces."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS[REPLACED])
    return NAME


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers' `sdpa`, for one row (1, heads, tokens, size) of sequences that begin at `cu_seq_lens_q`."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    borders = [] if cu_seq_lens_q is None else cu_seq_lens_q.tolist()
    if attention_mask is None or len(borders) < 3 or key.shape[2] != query.shape[2]:
        answer, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **more)
        return answer, None
    window = more.get("sliding_window") or key.shape[2]
    plain = bool(getattr(module, "is_causal", False))
    parts = []
    for start, end in pairwise(borders):
        mask = None if plain and end - start <= window else attention_mask[..., start:end, start:end]
        own = (each[:, :, start:end] for each in (query, key, value))
        parts.append(sdpa_attention_forward(module, *own, mask, **more)[0])
    return torch.cat(parts, 1), None
