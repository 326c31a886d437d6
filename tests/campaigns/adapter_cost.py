"""What adapters cost a step of the fused kernels, by itself: no engine, no server.

    python -m tests.campaigns.adapter_cost [--size 135M] [--weights bf16 int8 int4] [--rows 1 16] [--adapters 0 1 16]
        [--rank 8] [--rounds 60] [--context 150]

A decoder of random weights, as large as SmolLM2-135M or a part of a 1B, computes the same step without adapters, with
one of `--rank` for all rows, and with sixteen, in turns. Prints milliseconds (the median and the least), and the step
without adapters over it: what is to be 0.97 with one of rank 8 and 0.93 with sixteen at 16 rows. With
`OMP_NUM_THREADS=1` they are milliseconds of the processor, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

from tests.support.engine_threads import begin_anew


def measured(given: argparse.Namespace, weights: int, rows: int) -> dict[int, list[float]]:
    """Milliseconds of a step, by how many adapters there are."""
    from unittest.mock import patch

    import torch

    from serve.cpu_kernels import packing, step
    from tests.support.decoders import SETATTR, Adapters, Engine, decoder_of, fused_of, like

    kind = like(given.size, weights, rows, given.context)
    decoder, _ = decoder_of(kind)
    adapters = Adapters(kind, decoder, [given.rank] * max(given.adapters), keep=False)
    found: dict[int, list[float]] = {count: [] for count in given.adapters}
    with patch.object(step, "get_forward_context", lambda: engine):
        fused = fused_of(SETATTR, decoder, packing.BF16 if weights == packing.BF16 else packing.GROUP8)
        engine = Engine(kind)
        for layer in decoder.layers:
            layer.attention.kv_cache.normal_()
        positions, _ = engine.schedule({row: (given.context - 1, given.context) for row in range(rows)})
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        ids = torch.randint(kind.vocabulary, (rows,), dtype=torch.int32)
        for number in range(given.rounds + 3):
            for count in given.adapters if number % 2 else given.adapters[::-1]:
                adapters.choose([row % count if count else -1 for row in range(rows)])
                began = clock()
                fused.step(ids, positions)
                if number >= 3:
                    found[count].append(1000 * (clock() - began))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=["135M", "1B"], default="135M")
    parser.add_argument("--weights", nargs="*", default=["bf16", "int8", "int4"], choices=["bf16", "int8", "int4"])
    parser.add_argument("--rows", nargs="*", type=int, default=[1, 16])
    parser.add_argument("--adapters", nargs="*", type=int, default=[0, 1, 16])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--context", type=int, default=150)
    given = parser.parse_args()
    begin_anew()

    from serve.cpu_kernels import packing
    from tests.campaigns.cpu_speed import processor

    print(f"{given.size}, adapters of rank {given.rank}, {given.rounds} rounds, {processor()}\n")
    print(f"| weights | rows | {' | '.join(f'{count} adapters' for count in given.adapters)} |")
    print(f"|---|---|{'---|' * len(given.adapters)}", flush=True)
    for name in given.weights:
        weights = {"bf16": packing.BF16, "int8": packing.GROUP8, "int4": packing.GROUP4}[name]
        for rows in given.rows:
            found, cells = measured(given, weights, rows), []
            for count, times in found.items():
                ratio = median(base / one for base, one in zip(found[given.adapters[0]], times, strict=True))
                cells.append(f"{median(times):.2f} ({min(times):.2f})" + (f", {ratio:.3f}" if count else ""))
            print(f"| {name} | {rows} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
