"""`make kernel-rows`: a layer's products by the number of tokens, by the kernels of several checkouts, in turns.

    python -m tests.campaigns.kernel_rows [CHECKOUT ...] [--size 1B] [--weights int4] [--rows 1 4 8 16 36 192]
        [--rounds 15] [--prompts]

What one token takes says how fast weights are read, what hundreds take how fast they are multiplied; in between both
wait for one another. Several layers are multiplied, more than the caches hold. The kernels of this checkout are the
first. Libraries of other sources have tables and buffers of their own (`-fno-gnu-unique`): in one process all of them
would go on with those of the first one otherwise, and a change in a tile would seem to change nothing. Their turns have
a new order each time, since whoever comes twice in a row finds some of its own weights in the caches.

Prints milliseconds (median), those of one token, and the time as a part of the first one's (the median of rounds);
results of others that differ are said.
"""

from __future__ import annotations

import argparse
import ctypes
import random
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from serve.models.gguf.kept import SCALES
from tests.campaigns.matrix_speed import ASIDE, KINDS, LAYERS, format_of, shapes
from tests.support.engine_threads import begin_anew

BYTES = 120_000_000  # of weights in 4 bits, at least: several times what caches hold


class Kernels:
    """The kernels of one checkout, and layers that they have packed."""

    def __init__(
        self, checkout: Path, matrices: list[Callable[[ctypes.CDLL], int]], layers: int, prompts: bool = False
    ) -> None:
        from serve.cpu_kernels import build

        path = build.compiled_kernels(checkout / "serve/cpu_kernels", "-fno-gnu-unique")
        if path is None:
            raise SystemExit("no C++ compiler")
        self.library = ctypes.CDLL(str(path))
        self.layers = [[matrix(self.library) for matrix in matrices] for _ in range(layers)]
        self.times: list[float] = []
        self.prompts = prompts and hasattr(self.library, "loradock_product")

    def run(self, inputs: list[Any], outputs: list[Any]) -> float:
        began = time.perf_counter()
        for layer in self.layers:
            for number, x, y in zip(layer, inputs, outputs, strict=True):
                if self.prompts:
                    self.library.loradock_product(number, _at(x), ctypes.c_int64(x.stride(0)), len(x), 1, _at(y))
                else:
                    self.library.loradock_linear(number, _at(x), ctypes.c_int64(x.stride(0)), len(x), _at(y))
        return time.perf_counter() - began


def rounded(weights: str, n: int, k: int) -> Callable[[ctypes.CDLL], int]:
    """What packs a matrix of random weights, rounded to the bits of `--cpu-weights`."""
    import torch

    from serve.cpu_kernels import packing

    kind = format_of(weights)
    aside = ASIDE if weights == "int4-offsets" else 0.0
    w = (torch.randn(n, k) * 0.02 + aside).bfloat16()
    return lambda library: library.loradock_matrix(_at(w), n, k, kind, packing.GROUPS[kind], None, None, 0)


def of_file(kind: str, n: int, k: int) -> Callable[[ctypes.CDLL], int]:
    """What packs a matrix of random blocks of a GGUF file's type."""
    import numpy as np

    from tests.support.gguf_files import packed_blocks, scaled_blocks

    raw = scaled_blocks(kind, (n, k), np.random.default_rng(0))
    return lambda library: packed_blocks([(kind, raw)], n, k, kernels=library)


def _at(tensor: Any) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def compare(all_kernels: dict[str, Kernels], sizes: list[tuple[int, int]], rows: int, rounds: int) -> str:
    """One row of the table."""
    import torch

    inputs = [torch.randn(rows, k).bfloat16() for _, k in sizes]
    outputs = [torch.empty(rows, n).bfloat16() for n, _ in sizes]
    results = {}
    for name, kernels in all_kernels.items():
        kernels.run(inputs, outputs)
        results[name], kernels.times = [y.clone() for y in outputs], []
    for _ in range(rounds):
        for kernels in random.sample(list(all_kernels.values()), len(all_kernels)):
            kernels.times.append(kernels.run(inputs, outputs))
    first, cells = next(iter(all_kernels)), [str(rows)]
    for name, kernels in all_kernels.items():
        ratios = [one / its for one, its in zip(kernels.times, all_kernels[first].times, strict=True)]
        took = 1000 * median(kernels.times)
        same = all(map(torch.equal, results[name], results[first]))
        cells.append(f"{took:.2f}, {took / rows:.3f}, {median(ratios):.3f}{'' if same else ', other results'}")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkouts", nargs="*", type=Path, metavar="CHECKOUT")
    parser.add_argument("--size", default="1B", choices=LAYERS)
    parser.add_argument("--weights", default="int4", choices=[*KINDS, *SCALES])
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 4, 8, 16, 36, 192])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--prompts", action="store_true", help="rows are of prompts: AMX multiplies them where it can")
    given = parser.parse_args()
    begin_anew()

    from tests.campaigns.cpu_speed import processor

    sizes = shapes(given.size)
    make = of_file if given.weights in SCALES else rounded
    matrices = [make(given.weights, n, k) for n, k in sizes]
    layers = -(-BYTES * 2 // sum(n * k for n, k in sizes))
    checkouts = [Path(__file__).parents[2], *given.checkouts]
    names = [f"{number} {checkout.name}" for number, checkout in enumerate(checkouts)]
    all_kernels = {
        name: Kernels(checkout, matrices, layers, given.prompts)
        for name, checkout in zip(names, checkouts, strict=True)
    }
    print(f"{layers} layers of {given.size}, {given.weights}, {given.rounds} rounds, {processor()}. ms, ms a token,")
    print(f"and as a part of the first\n\n| tokens | {' | '.join(names)} |\n|{'---|' * (1 + len(names))}", flush=True)
    for rows in given.rows:
        print(compare(all_kernels, sizes, rows, given.rounds), flush=True)


if __name__ == "__main__":
    main()
