"""`make start`: how soon `loradock serve` is ready, of this checkout and of others, in turns.

    python -m tests.campaigns.start [--against DIR ...] [--rounds 7] [--model DIR] [SERVER ARGS]

Each checkout's server is started once beforehand: what it compiles and reads is then there, as at every later start.
The table has seconds until `/ready` says so (median, and the least and the most), seconds of processor time that the
server's processes took until then, and their memory (PSS), in MB. The ratio is that of each round's pair.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import psutil

from tests.campaigns.cpu_speed import processor
from tests.campaigns.memory import processes
from tests.support.server import BASE, ROOT, SMALL, Server, descendants


@dataclass
class Checkout:
    """One whose server is started, and what was seen."""

    root: Path
    seconds: list[float] = field(default_factory=list)
    computed: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)

    def start(self, model: str, more: list[str], note: bool) -> None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            with Server(folder / "data", folder / "log", *SMALL, *more, model=model, root=self.root) as server:
                pid = server.process.pid
                if note:
                    self.seconds.append(server.seconds_to_ready)
                    self.computed.append(sum(map(_computed, {pid} | descendants(pid))))
                    self.memory.append(sum(one.pss for one in processes(pid)))

    def row(self, first: Checkout) -> str:
        pairs = [mine / other for mine, other in zip(self.seconds, first.seconds, strict=True)]
        spread = f"{median(self.seconds):.1f} ({min(self.seconds):.1f} to {max(self.seconds):.1f})"
        sums = f"{median(self.computed):.1f} | {median(self.memory):,.0f}"
        return f"| {self.root.name} | {spread} | {median(pairs):.2f} | {sums} |"


def _computed(pid: int) -> float:
    with suppress(psutil.Error):
        times = psutil.Process(pid).cpu_times()
        return float(times.user + times.system)
    return 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--against", type=Path, nargs="*", default=[], help="other checkouts")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--model", default=BASE)
    given, more = parser.parse_known_args()
    every = [Checkout(root.resolve()) for root in (ROOT, *given.against)]
    for number in range(given.rounds + 1):
        for checkout in every if number % 2 else every[::-1]:
            checkout.start(given.model, more, note=number > 0)
    print(f"{given.model}, {given.rounds} rounds, {processor()}\n")
    print("| checkout | seconds | ratio | processor's seconds | MB |\n|---|---|---|---|---|")
    for checkout in every:
        print(checkout.row(every[0]))


if __name__ == "__main__":
    main()
