"""What rounding on a GPU makes of the effect probe and of the hourly comparison: errors, and faint effects still told.

    python -m tests.campaigns.probe_noise [--runs 1000] [--kind free|steps|batch]

Noise of .02 to .1 nats is put on the answers of an engine, in three ways (tests/support/rounding.py); the judging is
the server's own code. A false refusal, a false admission and a false alarm of drift must each be rarer than 1 % with a
confidence of 95 %, at every noise. 1,000 runs of each take some minutes on one core.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import AsyncIterator, Sequence

from tests.campaigns.finished_streams import interval
from tests.support.rounding import KINDS, admitted, alarms

NATS = (0.02, 0.05, 0.1)
MOST = 0.01
# Adapters, by nats: a trained one at a twentieth of its scale moves .13; the limit is .08.
EFFECTS = ("0", "0.04", "0.1", "0.13", "0.3")
REFUSED, TAKEN = ("0",), ("0.13", "0.3")
# A version moved the base by .2. What it does at a later start, and by how much its kernels moved the base.
CHANGES = (("0.2", 0.0), ("0.2", 0.05), ("0.5", 0.0), ("0.9", 0.0), ("0.9", 0.05))
SAME, CHANGED = "0.2", "0.9"


async def rows(runs: int, kinds: Sequence[str]) -> AsyncIterator[tuple[str, int, int | None]]:
    """(what is counted, how often, how often of `runs` is an error; None where nothing is promised)."""
    for kind in kinds:
        for nats in NATS:
            where = f"{kind}, noise of {nats:g} nats"
            for moves in EFFECTS:
                taken = await admitted(nats, kind, moves, range(runs))
                wrong = taken if moves in REFUSED else runs - taken if moves in TAKEN else None
                yield (f"{where}: an adapter that moves {moves} is taken", taken, wrong)
            for then, moved in CHANGES:
                raised = await alarms(nats, kind, then, range(runs), moved)
                wrong = raised if then == SAME else runs - raised if then == CHANGED else None
                yield (f"{where}: .2, then {then}, kernels moved {moved:g}: an alarm", raised, wrong)


async def run(runs: int, kinds: Sequence[str]) -> float:
    """The highest bound of all errors that are promised to be rare."""
    worst = 0.0
    async for what, count, wrong in rows(runs, kinds):
        bound = 0.0 if wrong is None else interval(wrong, runs)[1]
        print(f"{what}: {count} of {runs}" + (f"; errors {wrong}, rarer than {bound:.2%}" if bound else ""), flush=True)
        worst = max(worst, bound)
    return worst


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--kind", action="append", choices=KINDS)
    given = parser.parse_args()
    worst = asyncio.run(run(given.runs, given.kind or KINDS))
    print(f"each error is rarer than {worst:.2%}, with a confidence of 95 %; {MOST:.0%} is promised")
    return int(worst >= MOST)


if __name__ == "__main__":
    sys.exit(main())
