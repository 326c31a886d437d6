"""Weights in ggml's blocks: what ggml's own library reads. Layouts: ggml's `ggml-common.h` and `ggml-quants.c`.

Q4_K and Q6_K are found here, all groups at once: each group tries several scales and takes the one whose squared error
is least. The other types are the `gguf` package's, unless they are `calibrated`.
"""

from __future__ import annotations

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

from optimize.steps.quantize.gptq import gptq, scales

# What a matrix becomes whose inputs are no multiple of 256, as llama.cpp has it.
NARROW = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}
SUPER = 256
AT_ONCE = 1 << 22  # weights
TRIES_Q4 = 21
TRIES_Q6 = 19
# Bits, and how many weights share a scale, of what can be `calibrated`.
CALIBRATED = {"Q4_0": (4, 32), "Q4_K": (4, 32), "Q5_0": (5, 32), "Q6_K": (6, 16), "Q8_0": (8, 32)}


def kind_of(wanted: str, inputs: int) -> str:
    """The type that a matrix with so many inputs can have."""
    kind = NARROW.get(wanted, wanted) if inputs % SUPER else wanted
    return "F16" if inputs % gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0] else kind


def blocks(weights: torch.Tensor, kind: str) -> NDArray[np.uint8]:
    """(outputs, bytes) of float32 weights (outputs, inputs)."""
    if kind in ("Q4_K", "Q6_K"):
        pack = _q4_k if kind == "Q4_K" else _q6_k
        rows = max(1, AT_ONCE // weights.shape[1])
        made = [pack(part.float().reshape(-1, SUPER)).reshape(len(part), -1) for part in weights.split(rows)]
        return np.concatenate(made)
    values = gguf.quantize(weights.float().numpy(), gguf.GGMLQuantizationType[kind])
    return np.ascontiguousarray(values).view(np.uint8).reshape(len(weights), -1)


def _safe(of: torch.Tensor) -> torch.Tensor:
    """1 / x, and 0 for 0."""
    return torch.where(of == 0, 0.0, 1 / torch.where(of == 0, 1.0, of))


def calibrated(weights: torch.Tensor, kind: str, hessian: torch.Tensor, importance: torch.Tensor) -> NDArray[np.uint8]:
    """`blocks` of a kind that `CALIBRATED` holds, rounded by GPTQ.

    `hessian` is the damped sum of x xT over inputs x (inputs, inputs), and `importance` its diagonal before: scales are
    those with the least squared error that is weighted by it.
    """
    rows, columns = weights.shape
    if kind == "Q4_K":
        heavy = importance.view(-1, 8, 32)
        few = max(1, AT_ONCE // columns)
        found = [_scales_q4_k(part.reshape(-1, 8, 32), heavy.repeat(len(part), 1, 1)) for part in weights.split(few)]
        d, s, least, m = (torch.cat(part) for part in zip(*found, strict=True))
        scale, less = ((of[:, None] * by).view(rows, -1) for of, by in ((d, s), (least, m)))
        integers = gptq(weights + less.repeat_interleave(32, 1), hessian, _steps(scale), 4, lowest=0)
        return _pack_q4_k(d, s, least, m, integers.view(-1, 8, 32).to(torch.uint8)).reshape(rows, -1)
    bits, group = CALIBRATED[kind]
    scale = scales(weights, bits, group, importance)
    if kind == "Q6_K":
        d, s = _eighths(scale.view(-1, 16))
        integers = gptq(weights, hessian, _steps((d[:, None] * s).view(rows, -1)), 6)
        return _pack_q6_k(d, s, integers.view(-1, 16, 16)).reshape(rows, -1)
    d = scale.half().float()
    integers = gptq(weights, hessian, _steps(d), bits).view(-1, 32)
    return np.concatenate([_halves(d.view(-1)), *_numbers(integers, bits)], axis=1).reshape(rows, -1)


def _steps(scale: torch.Tensor) -> torch.Tensor:
    """Of a scale of 0 everything is 0."""
    return torch.where(scale == 0, torch.finfo(torch.float32).max, scale)


def _numbers(integers: torch.Tensor, bits: int) -> list[NDArray[np.uint8]]:
    """Groups of 32 (groups, 32) from `-2 ** (bits - 1)` on: bytes; or fifth bits, and lower halves of bytes first."""
    if bits == 8:
        return [integers.view(torch.uint8).numpy()]
    up = (integers + 2 ** (bits - 1)).to(torch.uint8)
    low = up & 15
    lower = (low[:, :16] | (low[:, 16:] << 4)).numpy()
    return [lower] if bits == 4 else [np.packbits((up >> 4).numpy(), axis=1, bitorder="little"), lower]


def _q4_k(rows: torch.Tensor) -> NDArray[np.uint8]:
    """Groups of 32: scales and minima are 6 bits, times two float16 of 256."""
    x = rows.view(-1, 8, 32)
    # Large weights count for more, as in ggml.
    d, s, least, m = _scales_q4_k(x, x.square().mean(-1, keepdim=True).sqrt() + x.abs())
    by, less = (d[:, None] * s)[..., None], (least[:, None] * m)[..., None]
    return _pack_q4_k(d, s, least, m, ((x + less) * _safe(by)).round().clamp(0, 15).to(torch.uint8))


def _scales_q4_k(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Scale of 256, by what it becomes each group's, and both of minima; errors count as much as `weight` says."""
    scale, low = _asymmetric(x, weight, 15, TRIES_Q4)
    return *_sixths(scale), *_sixths(low)


def _pack_q4_k(
    d: torch.Tensor, s: torch.Tensor, least: torch.Tensor, m: torch.Tensor, q: torch.Tensor
) -> NDArray[np.uint8]:
    packed = torch.zeros(len(q), 12, dtype=torch.uint8)
    s, m = s.to(torch.uint8), m.to(torch.uint8)
    packed[:, :4], packed[:, 4:8] = s[:, :4] | (s[:, 4:] >> 4 << 6), m[:, :4] | (m[:, 4:] >> 4 << 6)
    packed[:, 8:] = (s[:, 4:] & 15) | ((m[:, 4:] & 15) << 4)
    pairs = q.view(-1, 4, 2, 32)
    numbers = (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).reshape(-1, 128)
    return np.concatenate([_halves(d), _halves(least), packed.numpy(), numbers.numpy()], axis=1)


def _asymmetric(x: torch.Tensor, weight: torch.Tensor, most: int, tries: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, minimum) of each group, x ~ scale q - minimum with q from 0 to `most`; both are at least 0."""
    low = x.amin(-1).clamp(max=0)
    span = x.amax(-1) - low
    total, sums = weight.sum(-1), (weight * x).sum(-1)
    best = torch.full_like(span, torch.inf)
    scale, least = span / most, -low
    for number in range(tries):
        inverse = (most - 1 + 0.1 * number) * _safe(span)
        q = ((x - low[..., None]) * inverse[..., None]).round().clamp(0, most)
        wq = (weight * q).sum(-1)
        wqq, wxq = (weight * q * q).sum(-1), (weight * q * x).sum(-1)
        of = _safe(total * wqq - wq * wq)
        by, offset = (total * wxq - sums * wq) * of, (wqq * sums - wq * wxq) * of
        # A minimum above 0 cannot be said: then the scale alone is fitted.
        alone = offset > 0
        by, offset = torch.where(alone, wxq * _safe(wqq), by), torch.where(alone, 0.0, offset)
        error = (weight * (by[..., None] * q + offset[..., None] - x).square()).sum(-1)
        better = (error < best) & (by > 0)
        best, scale = torch.where(better, error, best), torch.where(better, by, scale)
        least = torch.where(better, -offset, least)
    return scale, least


def _sixths(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One float16 for eight values, and the 6 bits by which it becomes each."""
    step = (values.amax(-1) / 63).half().float()
    return step, (values * _safe(step)[:, None]).round().clamp(0, 63)


def _q6_k(rows: torch.Tensor) -> NDArray[np.uint8]:
    """Groups of 16: scales are 8 bits, times one float16 of 256."""
    x = rows.view(-1, 16, 16)
    weight = x.square()
    widest = x.gather(-1, x.abs().argmax(-1, keepdim=True)).squeeze(-1)
    best, scale = torch.full_like(widest, -1.0), torch.zeros_like(widest)
    for number in range(TRIES_Q6):
        inverse = -(32 + 0.1 * (number - TRIES_Q6 // 2)) * _safe(widest)
        q = (x * inverse[..., None]).round().clamp(-32, 31)
        wqq, wxq = (weight * q * q).sum(-1), (weight * q * x).sum(-1)
        explained = wxq * wxq * _safe(wqq)
        better = explained > best
        best, scale = torch.where(better, explained, best), torch.where(better, wxq * _safe(wqq), scale)
    d, s = _eighths(scale)
    return _pack_q6_k(d, s, (x * _safe(d[:, None] * s)[..., None]).round().clamp(-32, 31))


def _eighths(scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One float16 for sixteen scales, and the 8 bits by which it becomes each."""
    top = scale.gather(-1, scale.abs().argmax(-1, keepdim=True)).squeeze(-1)
    d = (top / -128).half().float()
    return d, (scale * _safe(d)[:, None]).round().clamp(-128, 127)


def _pack_q6_k(d: torch.Tensor, s: torch.Tensor, q: torch.Tensor) -> NDArray[np.uint8]:
    four = q.add(32).to(torch.uint8).view(-1, 2, 4, 32)  # of each 128: four rows of 32
    low, high = four & 15, four >> 4
    lower = torch.cat((low[:, :, 0] | (low[:, :, 2] << 4), low[:, :, 1] | (low[:, :, 3] << 4)), dim=-1)
    upper = high[:, :, 0] | (high[:, :, 1] << 2) | (high[:, :, 2] << 4) | (high[:, :, 3] << 6)
    parts = lower.reshape(-1, 128), upper.reshape(-1, 64), s.to(torch.int8).view(torch.uint8)
    return np.concatenate([*(part.numpy() for part in parts), _halves(d)], axis=1)


def _halves(values: torch.Tensor) -> NDArray[np.uint8]:
    return values.half().numpy().view(np.uint8).reshape(-1, 2)
