"""How fast packed weights are read in huge pages and in small ones: products of one row with one matrix after another.

    python -m tests.campaigns.huge_pages [--megabytes 400] [--rounds 15]

Both lie side by side in one process and take turns. Prints the processor, GB/s (median, and the least and the most) for
bfloat16, 8 and 4 bits, and how much of the weights the kernel really gave huge pages.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import time
from pathlib import Path
from statistics import median

N, K = 4096, 2048  # as of a model of 1B


def main() -> None:
    from serve.models.hardware import cpu_environment

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=400, help="of weights in a pass: more than caches hold")
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    os.environ.update(cpu_environment(os.environ, together=True))

    import torch

    from serve.cpu_kernels import packing
    from serve.cpu_kernels.build import library, step_available
    from serve.cpu_kernels.operators import packed_linear
    from tests.campaigns.cpu_speed import processor

    if not step_available():
        raise SystemExit("this processor has no fused step")
    kernels = library()
    assert kernels is not None
    kernels.loradock_matrix_bytes.restype = ctypes.c_int64
    weight, x = (torch.randn(N, K) * 0.02).bfloat16(), torch.randn(1, K).bfloat16()
    print(processor())
    for name, kind in (("bfloat16", packing.BF16), ("int8", packing.GROUP8), ("int4", packing.GROUP4)):
        matrices: dict[bool, list[int]] = {}
        for huge in (True, False):
            kernels.loradock_huge_pages(int(huge))
            matrices[huge] = [packing.matrix(weight, kind)]
            size = int(kernels.loradock_matrix_bytes(matrices[huge][0]))
            # Memory is taken in pieces of 64 MB: what is left of the last one is of the other kind.
            left = [packing.matrix(weight, kind) for _ in range((64 << 20) // size + 1)]
            matrices[huge] = left[-1:]
            matrices[huge] += [packing.matrix(weight, kind) for _ in range((given.megabytes << 20) // size - 1)]
        speed: dict[bool, list[float]] = {True: [], False: []}
        for turn in range(given.rounds + 1):
            for huge in (True, False) if turn % 2 else (False, True):
                began = time.perf_counter()
                for number in matrices[huge]:
                    packed_linear(x, number, N)
                if turn:  # the first warms up
                    speed[huge].append(len(matrices[huge]) * size / (time.perf_counter() - began) / 1e9)
        ratio = [one / other for one, other in zip(speed[True], speed[False], strict=True)]
        said = [f"{median(s):.1f} ({min(s):.1f} to {max(s):.1f})" for s in speed.values()]
        print(f"{name}: huge pages {said[0]} GB/s, small {said[1]}; ", end="")
        print(f"ratio of a turn's pair {median(ratio):.2f} ({min(ratio):.2f} to {max(ratio):.2f})", flush=True)
    rollup = Path("/proc/self/smaps_rollup").read_text()
    print("in huge pages:", *re.findall(r"^AnonHugePages:\s+(\d+ kB)", rollup, re.MULTILINE))


if __name__ == "__main__":
    main()
