"""How many golden cases it takes until a canary is called worse, and how often one that is not is. Simulated.

python -m tests.campaigns.golden_cases [--streams 400] [--cases 500] [--alpha 0.01]
"""

from __future__ import annotations

import argparse
from bisect import bisect_left

import numpy as np

from serve.sequential.golden_comparison import compare

# The part that the live version passes, what the canary fails of it, and what it passes of the rest.
CANARIES = (
    (0.9, 0.02, 0.02),
    (0.9, 0.05, 0.05),
    (0.6, 0.20, 0.20),
    (0.9, 0.02, 0.0),
    (0.9, 0.05, 0.0),
    (0.9, 0.10, 0.0),
    (0.9, 0.12, 0.02),
    (0.6, 0.20, 0.10),
    (0.9, 0.20, 0.0),
    (0.9, 0.50, 0.0),
)


def drawn(lots: np.random.Generator, count: int, live: float, worse: float, better: float) -> list[tuple[float, float]]:
    """Passes (1) and fails (0) of both versions on as many cases."""
    draws = lots.random((count, 2))
    ours = draws[:, 0] < live
    theirs = np.where(ours, draws[:, 1] >= worse / live, draws[:, 1] < better / (1 - live))
    return list(zip(ours.astype(float), theirs.astype(float), strict=True))


def cases_until_worse(pairs: list[tuple[float, float]], alpha: float) -> int | None:
    """After how many of them the canary is called worse, looked at after each; None if it never is."""
    if not compare(pairs, alpha).worse:
        return None
    return bisect_left(range(len(pairs) + 1), True, key=lambda count: compare(pairs[:count], alpha).worse)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=400)
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--alpha", type=float, default=0.01)
    options = parser.parse_args()
    lots = np.random.default_rng(11)
    print("live passes | canary fails of those | passes of the rest | called worse | cases, median")
    for live, worse, better in CANARIES:
        streams = [drawn(lots, options.cases, live, worse, better) for _ in range(options.streams)]
        counts = [cases_until_worse(pairs, options.alpha) for pairs in streams]
        called = [count for count in counts if count is not None]
        median = f"{np.median(called):.0f}" if called else "-"
        print(f"{live:.2f} | {worse:.2f} | {better:.2f} | {len(called)} of {len(counts)} | {median}", flush=True)


if __name__ == "__main__":
    main()
