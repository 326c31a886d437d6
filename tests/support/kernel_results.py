"""What the kernels of this build compute, into a file: products of every kind, steps of small decoders, adapters' sums.

    LORADOCK_CPU_MARCH=haswell python -m tests.support.kernel_results results.pt

Everything is computed for one row by itself too: that has to be the same to the last bit, and is looked at here. What
other processors compute may be another rounding, which `compare` knows.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import torch

from serve.cpu_kernels import build, operators, packing, step
from serve.models.gguf.file import TYPE_NUMBERS
from serve.models.gguf.kept import BLOCKS, SCALES
from tests.support.decoders import SETATTR, Adapters, Engine, Kind, decoder_of, fused_of

ROWS = (2, 3, 4, 5, 7, 13)
# Of each step: the tokens of each request.
SPANS: tuple[dict[int, tuple[int, int]], ...] = (
    {0: (0, 47)},
    {0: (47, 147), 1: (0, 36)},
    {0: (147, 148), 1: (36, 38)},
    {0: (148, 149)},
    {0: (149, 150), 1: (38, 39)},
)
KINDS = {
    "heads of 32": Kind(),
    "heads of 64": Kind(head=64, heads=7, kv_heads=1, rotary=(64, 64), cap=1.5),
    "heads of 96": Kind(head=96, rotary=(96, 96), windows=(20, 0)),
    "one head of 96": Kind(head=96, heads=1, kv_heads=1, rotary=(96, 96)),
    "heads of 128": Kind(head=128, kv_heads=4, rotary=(128, 128), interleaved=True),
    "heads of 256": Kind(head=256, heads=3, kv_heads=1, rotary=(256, 256)),
    "int8": Kind(hidden=80, inner=208, weights=packing.GROUP8),
    "int4": Kind(hidden=80, inner=208, weights=packing.GROUP4),
}


def matrices(outputs: int = 80, inputs: int = 640) -> dict[str, int]:
    """The numbers of matrices of every kind of weights."""
    torch.manual_seed(0)
    weight = (torch.randn(outputs, inputs) * 0.1).bfloat16()
    int8 = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    int8[0], int8[1] = 127, -127
    made = {
        "bf16": packing.matrix(weight, packing.BF16),
        "int8": packing.matrix(int8, packing.CHANNEL8, torch.rand(outputs) + 0.1),
        "int8 g64": packing.matrix(weight, packing.GROUP8),
        "int4 g32": packing.matrix(weight, packing.GROUP4),
    }
    for group, bits in ((16, 4), (32, 4), (128, 4), (16, 8), (128, 8)):
        # The largest and the least of weights and inputs: sums in 16 bits have to hold them.
        numbers = torch.randint(0, 1 << bits, (outputs, inputs))
        numbers[0], numbers[1] = 0, (1 << bits) - 1
        for zeros in (False, True)[: 2 if bits == 4 else 1]:
            made[f"{bits} bits, groups of {group}{', zero points' * zeros}"] = _integers(numbers, bits, group, zeros)
    made |= {f"ggml's {kind}": _ggml(kind, outputs, 512) for kind in SCALES}
    assert min(made.values()) >= 0
    return made


def _ggml(kind: str, outputs: int, inputs: int) -> int:
    weights, nbytes = BLOCKS[kind]
    raw = torch.randint(0, 256, (outputs, inputs // weights, nbytes), dtype=torch.uint8)
    raw[0], raw[1] = 255, 0  # the largest and the least numbers
    for at in SCALES[kind]:
        raw[:, :, at : at + 2] = torch.randn(*raw.shape[:2], 1).mul(0.01).half().view(torch.uint8)
    kernels = build.library()
    assert kernels is not None
    pointers, numbers = (ctypes.c_void_p * 1)(raw.data_ptr()), (ctypes.c_int * 1)(TYPE_NUMBERS[kind])
    return int(
        kernels.loradock_matrix_ggml(pointers, numbers, (ctypes.c_int * 1)(outputs), 1, outputs, inputs, None, 0)
    )


def _integers(numbers: torch.Tensor, bits: int, group: int, zeros: bool) -> int:
    outputs, inputs = numbers.shape
    each = 32 // bits
    packed = (numbers.view(outputs, -1, each) << torch.arange(each) * bits).sum(-1).to(torch.int32)
    scale = (torch.rand(outputs, inputs // group) + 0.1).bfloat16()
    zero = torch.randint(0, 16, scale.shape, dtype=torch.uint8) if zeros else None
    strides, scale_strides = (ctypes.c_int64 * 2)(*packed.stride()), (ctypes.c_int64 * 2)(*scale.stride())
    kernels = build.library()
    assert kernels is not None
    return int(
        kernels.loradock_matrix_integers(
            packing.at(packed), strides, bits, packing.at(scale), packing.at(zero), scale_strides, outputs, inputs,
            group, None, 0,
        )
    )  # fmt: skip


def products() -> dict[str, torch.Tensor]:
    results, kernels = {}, build.library()
    assert kernels is not None
    for name, number in matrices().items():
        torch.manual_seed(1)
        x = torch.randn(400, 640).bfloat16()
        x[0], x[1], x[2] = 1, -1, 0
        x = x[:, : kernels.loradock_matrix_inputs(number)]
        each = torch.cat([_logits(number, row) for row in x.split(1)])
        for rows in (*ROWS, 40):  # of blocks that are unpacked too
            assert torch.equal(_logits(number, x[:rows]), each[:rows]), (name, rows)
        many = _product(number, x, prompts=True)
        for rows in (1, 16, 17, 40, 385):
            assert torch.equal(_product(number, x[:rows], prompts=True), many[:rows]), (name, rows)
        if not build.instructions().endswith("AMX"):
            assert torch.equal(_product(number, x, prompts=False), many), name
        results[f"products: {name}"] = each
        results[f"products of prompts: {name}"] = many
    return {**results, **_products_in_passes()}


def _products_in_passes() -> dict[str, torch.Tensor]:
    """Of so many rows that they pass more than once, the last time the most of them, and of so many blocks as are
    multiplied together. (What is written behind a buffer here, AddressSanitizer sees.)"""
    torch.manual_seed(2)
    weight, x = (torch.randn(256, 64) * 0.1).bfloat16(), torch.randn(1151, 64).bfloat16()
    number = packing.matrix(weight, packing.BF16)
    many = _product(number, x, prompts=True, outputs=256)
    for rows in (737, 767, 1106):
        assert torch.equal(_product(number, x[:rows], prompts=True, outputs=256), many[:rows]), rows
    return {"products of prompts in passes": many}


def _product(number: int, x: torch.Tensor, prompts: bool, outputs: int = 80) -> torch.Tensor:
    out, kernels = torch.empty(x.shape[0], outputs).bfloat16(), build.library()
    assert kernels is not None
    kernels.loradock_product(
        number, packing.at(x), ctypes.c_int64(x.stride(0)), x.shape[0], int(prompts), packing.at(out)
    )
    return out


def _logits(number: int, x: torch.Tensor, outputs: int = 80) -> torch.Tensor:
    out, one, none = torch.empty(x.shape[0], outputs), ctypes.c_float(1), ctypes.c_float(0)
    stride, out_stride = ctypes.c_int64(x.stride(0)), ctypes.c_int64(outputs)
    kernels = build.library()
    assert kernels is not None
    kernels.loradock_logits(
        number, packing.at(x), stride, x.shape[0], packing.at(out), out_stride, outputs, none, one
    )  # fmt: skip
    return out


def steps() -> dict[str, torch.Tensor]:
    """Prompts in pieces and single tokens, with adapters of several ranks and without."""
    results = {}
    for name, kind in KINDS.items():
        decoder, _ = decoder_of(kind)
        adapters = Adapters(kind, decoder, (16, 5, 1, 8), keep=False)
        fused, engine = fused_of(SETATTR, decoder), Engine(kind)
        SETATTR.setattr(step, "get_forward_context", _context(engine))
        torch.manual_seed(2)
        ids = torch.randint(kind.vocabulary, (2, 152), dtype=torch.int32)
        outputs = []
        for of_step in SPANS:
            positions, _ = engine.schedule(of_step)
            adapters.choose([at % 5 - 1 for at in range(len(positions))])
            out = fused.step(torch.cat([ids[number][begin:end] for number, (begin, end) in of_step.items()]), positions)
            assert out is not None
            outputs.append(out)
        results[f"steps: {name}"] = torch.cat(outputs)
    return results


def _context(engine: Engine) -> Any:
    return lambda: engine


def sums() -> dict[str, torch.Tensor]:
    """What adapters add to a layer of vLLM's, in sizes that fill no vector."""
    results = {}
    for dtype, eight in (*((dtype, False) for dtype in operators.DTYPES), (torch.bfloat16, True)):
        torch.manual_seed(3)
        plan, ranks = operators.Plan(), (1, 8, 17, 33)
        a = torch.zeros(len(ranks), 1, 33, 100, dtype=dtype)
        b = torch.zeros(len(ranks), 1, 203, 33, dtype=dtype)
        for slot, rank in enumerate(ranks):
            a[slot, 0, :rank] = torch.randn(rank, 100) * 0.1
            b[slot, 0, :, :rank] = torch.randn(203, rank) * 0.1
        layer = operators.Layer(plan, [a], [b], [203])
        if eight:
            layer.keep_eight_bits()
        for slot in range(len(ranks)):
            operators.load([layer], slot)
        plan.set(torch.tensor([number % 5 - 1 for number in range(23)]), len(ranks))
        y = torch.zeros(23, 203, dtype=dtype)
        operators.lora_linear(y, torch.randn(23, 100).to(dtype), layer.number)
        results[f"adapters: {dtype}{', in 8 bits' * eight}"] = y
    return results


def largest() -> dict[str, torch.Tensor]:
    kernels = build.library()
    assert kernels is not None
    torch.manual_seed(4)
    rows = [torch.randn(size).round(decimals=1) for size in (1, 15, 16, 17, 100, 1000)]
    found = [kernels.loradock_argmax(packing.at(row), ctypes.c_int64(len(row))) for row in rows]
    return {"argmax": torch.tensor(found)}


def compare(here: dict[str, Any], there: dict[str, Any]) -> None:
    """Fails where results differ by more than rounding explains."""
    assert there.keys() == here.keys()
    # Tiles multiply many rows, without rounding these to 8 bits.
    have_tiles = {results["instructions"].endswith("AMX") for results in (here, there)} - {False}
    one_has_tiles = here["instructions"].endswith("AMX") != there["instructions"].endswith("AMX")
    for name in there.keys() - {"instructions"}:
        mine, other = here[name].double(), there[name].double()
        apart = (mine - other).abs().max() / mine.abs().max()
        if name.startswith("products of prompts"):
            assert apart < (0.02 if one_has_tiles else 0.01), name  # bfloat16 outputs
        elif name.startswith("products"):
            # Of integers the sums are exact. Instructions that multiply bfloat16 round their sums in another way.
            assert apart < (1e-4 if name.endswith("bf16") else 1e-6), name
        elif name.startswith("steps"):
            rows = (mine - other).norm(dim=-1) / mine.norm(dim=-1)
            # A rounding to bfloat16 here and there; of rows to 8 bits. Tiles add up in another order than plain loops.
            most, middle = (0.2, 0.05) if have_tiles else (0.04, 0.02)
            assert rows.max() < most and rows.median() < middle, name
        else:
            assert apart < {"argmax": 1e-9, "adapters: torch.float32": 1e-5}.get(name, 2**-6), name


def randn(*shape: int) -> torch.Tensor:
    """In place of torch's, whose last bit depends on the processor: sums of four numbers of -1 to 1."""
    return torch.randint(-(1 << 15), 1 << 15, (4, *shape)).sum(0) / (1 << 15)


def main(file: str) -> None:
    assert build.step_available()
    SETATTR.setattr(torch, "randn", randn)
    results: dict[str, Any] = {**products(), **steps(), **sums(), **largest()}
    torch.save({"instructions": build.instructions(), **results}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
