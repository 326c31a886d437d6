"""What adapters cost a step of the fused kernels, by itself: no engine, no server.

    python -m tests.campaigns.adapter_cost [--size 135M] [--weights bf16 int8 int4] [--rows 1 16] [--adapters 0 1 16]
        [--rank 8] [--rounds 60] [--context 150] [--kinds]

A decoder of random weights, as large as SmolLM2-135M or a part of a 1B, computes the same step without adapters, with
one of `--rank` for all rows, and with sixteen, in turns. Prints milliseconds (the median and the least), and the step
without adapters over it: what is to be 0.97 with one of rank 8 and 0.93 with sixteen at 16 rows. With `--kinds` the
step has sixteen LoRAs, sixteen DoRAs of the same rank, one LoRA of three times the rank, and a mixture of three LoRAs:
a DoRA is to take at most 1.06 of a LoRA, a mixture 1.00 of the one of the summed rank. With `OMP_NUM_THREADS=1` they
are milliseconds of the processor, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import TYPE_CHECKING

from tests.support.engine_threads import begin_anew

if TYPE_CHECKING:
    from tests.support.decoders import Adapters

# The slot of each row, by the row.
Slots = Callable[[int], int]
MANY, PARTS = 16, 3


def counted(given: argparse.Namespace) -> Mapping[str, Slots]:
    """So many adapters in turns; -1 is none."""
    return {
        f"{count} adapters": (lambda row, count=count: row % count if count else -1)  # type: ignore[misc]
        for count in given.adapters
    }


def kinds(given: argparse.Namespace) -> Mapping[str, Slots]:
    """Slots as `of_kinds` fills them."""
    return {
        f"{MANY} LoRA": lambda row: row % MANY,
        f"{MANY} DoRA": lambda row: MANY + row % MANY,
        f"one of rank {PARTS * given.rank}": lambda row: 2 * MANY,
        f"a mixture of {PARTS}": lambda row: 2 * MANY + 1,
    }


def of_kinds(adapters: Adapters) -> None:
    """Half of the slots of rank `--rank` get magnitudes, and the last slot what its parts have, stacked."""
    import torch

    for slot in range(MANY, 2 * MANY):
        adapters.scale(slot)
    mixture = 2 * MANY + 1
    for layer in adapters.layers.values():
        for a, b in zip(layer.a, layer.b, strict=True):
            rank = a.shape[2] // PARTS
            a[mixture, 0] = torch.cat([a[part, 0, :rank] for part in range(PARTS)])
            b[mixture, 0] = torch.cat([b[part, 0, :, :rank] for part in range(PARTS)], dim=1)
    adapters.load(mixture)


def measured(given: argparse.Namespace, weights: int, rows: int) -> dict[str, list[float]]:
    """Milliseconds of a step, by which adapters it has."""
    from unittest.mock import patch

    import torch

    from serve.cpu_kernels import packing, step
    from tests.support.decoders import SETATTR, Adapters, Engine, decoder_of, fused_of, like

    kind = like(given.size, weights, rows, given.context)
    decoder, _ = decoder_of(kind)
    ranks = [given.rank] * max(given.adapters)
    if given.kinds:
        ranks = [given.rank] * 2 * MANY + [PARTS * given.rank] * 2
    adapters = Adapters(kind, decoder, ranks, keep=False)
    if given.kinds:
        of_kinds(adapters)
    series = kinds(given) if given.kinds else counted(given)
    found: dict[str, list[float]] = {name: [] for name in series}
    with patch.object(step, "get_forward_context", lambda: engine):
        fused = fused_of(SETATTR, decoder, packing.BF16 if weights == packing.BF16 else packing.GROUP8)
        engine = Engine(kind)
        for layer in decoder.layers:
            layer.attention.kv_cache.normal_()
        positions, _ = engine.schedule({row: (given.context - 1, given.context) for row in range(rows)})
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        ids = torch.randint(kind.vocabulary, (rows,), dtype=torch.int32)
        for number in range(given.rounds + 3):
            for name in series if number % 2 else reversed(series):
                adapters.choose([series[name](row) for row in range(rows)])
                began = clock()
                fused.step(ids, positions)
                if number >= 3:
                    found[name].append(1000 * (clock() - began))
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
    parser.add_argument("--kinds", action="store_true", help="LoRA, DoRA and mixtures beside one another")
    given = parser.parse_args()
    begin_anew()

    from serve.cpu_kernels import packing
    from tests.campaigns.cpu_speed import processor

    print(f"{given.size}, adapters of rank {given.rank}, {given.rounds} rounds, {processor()}\n")
    names = list(kinds(given) if given.kinds else counted(given))
    print(f"| weights | rows | {' | '.join(names)} |")
    print(f"|---|---|{'---|' * len(names)}", flush=True)
    for name in given.weights:
        weights = {"bf16": packing.BF16, "int8": packing.GROUP8, "int4": packing.GROUP4}[name]
        for rows in given.rows:
            found = measured(given, weights, rows)
            cells = [
                f"{median(found[name]):.2f} ({min(found[name]):.2f}){_ratio(found, name, given)}" for name in names
            ]
            print(f"| {name} | {rows} | {' | '.join(cells)} |", flush=True)


def _ratio(found: Mapping[str, list[float]], name: str, given: argparse.Namespace) -> str:
    """Of pairs of steps: a kind over the one before it, which it is held against; else, without adapters over with."""
    names = list(found)
    at = names.index(name)
    if given.kinds:
        pairs = zip(found[name], found[names[at - 1]], strict=True)
        return f", {median(one / other for one, other in pairs):.3f}" if at % 2 else ""
    pairs = zip(found[names[0]], found[name], strict=True)
    return f", {median(base / one for base, one in pairs):.3f}" if at else ""


if __name__ == "__main__":
    main()
