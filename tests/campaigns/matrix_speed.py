"""`make matrix-speed`: products of prompts of 1,024 tokens against the machine's own, in turns, on all cores.

    python -m tests.campaigns.matrix_speed [--sizes 135M 1B] [--weights bf16 int8 int4 int4-offsets] [--rows 1024]
        [--rounds 25]

The same shapes (a layer's four matrices) by oneDNN in bfloat16 and in int8, through torch and with weights that it has
packed itself, the faster of both; and by our products with packed weights, the rounding of their inputs included.
Then a whole step of the fused kernels, whose products are measured as what they are part of: with attention, norms and
all. `int4-offsets` are weights whose groups have offsets, as the embedded model's have; the step beside them has none.
Prints GFLOP/s (the median, with the least and the most), and ours over the machine's, which is to be 0.8.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from tests.support.engine_threads import begin_anew

LEAST = 0.8
KINDS = ("bf16", "int8", "int4", "int4-offsets")
ASIDE = 0.3  # weights so far from 0 get offsets
LAYERS = {"135M": 30, "1B": 6}


@dataclass
class Product:
    """One way to multiply one layer's inputs with all of its matrices."""

    name: str
    calls: list[Callable[[], Any]]
    times: list[float] = field(default_factory=list)

    def run(self) -> float:
        began = time.perf_counter()
        for call in self.calls:
            call()
        return time.perf_counter() - began


def shapes(size: str) -> list[tuple[int, int]]:
    """Outputs and inputs of a layer's matrices."""
    from tests.support.decoders import like

    kind = like(size, 0, 1, 1)
    q, kv = kind.heads * kind.head, kind.kv_heads * kind.head
    return [(q + 2 * kv, kind.hidden), (kind.hidden, q), (2 * kind.inner, kind.hidden), (kind.hidden, kind.inner)]


def machines(size: str, rows: int) -> dict[str, list[Product]]:
    """oneDNN's products, by the type of their numbers: several ways to call it."""
    import torch
    from vllm import _custom_ops as ops

    plain, packed, integers, scaled = [], [], [], []
    for outputs, inputs in shapes(size):
        x, weight = torch.randn(rows, inputs).bfloat16(), (torch.randn(outputs, inputs) * 0.02).bfloat16()
        plain.append(lambda x=x, w=weight.T: torch.mm(x, w))
        handler = ops.create_onednn_mm(weight.T, 32)
        packed.append(lambda x=x, handler=handler: ops.onednn_mm(handler, x, None))
        x8 = torch.randint(-127, 128, (rows, inputs), dtype=torch.int8)
        w8 = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
        integers.append(lambda x8=x8, w8=w8.T: torch._int_mm(x8, w8))
        eight = ops.create_onednn_scaled_mm(w8.T, torch.rand(outputs, 1) * 0.01, torch.bfloat16, True, False, 32)
        scale, out = torch.rand(rows, 1) * 0.01, torch.empty((rows, outputs), dtype=torch.bfloat16)
        scaled.append(lambda a=(eight, x8, out, scale): ops.onednn_scaled_mm(*a, None, None, None))
    return {
        "bf16": [Product("torch.mm", plain), Product("oneDNN, packed", packed)],
        "int8": [Product("torch._int_mm", integers), Product("oneDNN, packed and scaled", scaled)],
    }


def format_of(name: str) -> int:
    from serve.cpu_kernels import packing

    return {"bf16": packing.BF16, "int8": packing.GROUP8}.get(name, packing.GROUP4)


def ours(size: str, rows: int, name: str) -> Product:
    import torch

    from serve.cpu_kernels import packing
    from serve.cpu_kernels.operators import packed_linear

    aside, calls = ASIDE if name == "int4-offsets" else 0.0, []
    for outputs, inputs in shapes(size):
        weight, x = (torch.randn(outputs, inputs) * 0.02 + aside).bfloat16(), torch.randn(rows, inputs).bfloat16()
        number = packing.matrix(weight, format_of(name))
        assert packing.library().loradock_matrix_offsets(number) == (aside > 0)  # type: ignore[union-attr, attr-defined]
        calls.append(lambda x=x, number=number, outputs=outputs: packed_linear(x, number, outputs))
    return Product(f"loradock {name}", calls)


def whole_step(size: str, rows: int, name: str) -> Product:
    """A prompt's step without its output layer; its weights have no offsets."""
    import torch

    from serve.cpu_kernels import step
    from tests.support.decoders import SETATTR, Engine, decoder_of, fused_of, like

    kind = like(size, format_of(name), 1, rows)
    decoder, _ = decoder_of(kind)
    fused, engine = fused_of(SETATTR, decoder), Engine(kind)
    positions, _ = engine.schedule({0: (0, rows)})
    ids = torch.randint(kind.vocabulary, (rows,), dtype=torch.int32)

    def run() -> None:
        step.get_forward_context = lambda: engine  # type: ignore[assignment, attr-defined]
        fused.step(ids, positions)

    return Product(f"step {name}", [run])


def rate(flops: float, times: list[float]) -> str:
    speed = sorted(flops / one / 1e9 for one in times)
    return f"{median(speed):.0f} ({speed[0]:.0f} to {speed[-1]:.0f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", nargs="*", default=["135M", "1B"], choices=LAYERS)
    parser.add_argument("--weights", nargs="*", default=KINDS, choices=KINDS)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=25)
    given = parser.parse_args()
    begin_anew()

    from tests.campaigns.cpu_speed import processor

    print(f"{given.rows} rows, {given.rounds} rounds, {processor()}. GFLOP/s, int8 and int4 in GOP/s\n")
    print("| size | weights | loradock | the machine's own | ours / its own | whole step / its own products |")
    print("|---|---|---|---|---|---|", flush=True)
    below = []
    for size in given.sizes:
        flops = 2.0 * given.rows * sum(outputs * inputs for outputs, inputs in shapes(size))
        own = {}
        for name, ways in machines(size, given.rows).items():
            for way in ways:
                way.run()
            own[name] = min(ways, key=lambda way: min(way.run() for _ in range(3)))
        for name in given.weights:
            mine, step, its = (
                ours(size, given.rows, name),
                whole_step(size, given.rows, name),
                own["bf16" if name == "bf16" else "int8"],
            )
            its.times.clear()
            ratios, whole = [], []
            for number in range(given.rounds + 2):
                turn = {way.name: way.run() for way in ((mine, its, step) if number % 2 else (step, its, mine))}
                if number < 2:
                    continue
                mine.times.append(turn[mine.name])
                its.times.append(turn[its.name])
                ratios.append(turn[its.name] / turn[mine.name])
                whole.append(turn[its.name] * LAYERS[size] / turn[step.name])
            said = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            cells = [size, name, rate(flops, mine.times), f"{rate(flops, its.times)}, {its.name}", said]
            print(f"| {' | '.join([*cells, f'{median(whole):.2f}'])} |", flush=True)
            if median(ratios) < LEAST:
                below.append(f"{size} {name}: {median(ratios):.2f}")
    if below:
        raise SystemExit(f"below {LEAST}: {', '.join(below)}")


if __name__ == "__main__":
    main()
