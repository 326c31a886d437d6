"""Runs the streams of a campaign in processes of their own, and keeps each finished one as a line of JSON.

    finished = FinishedStreams(path, digest("serve/drift", "tests/campaigns/drift_streams.py"))
    finished.run(tasks, work, processes=2)        # tasks: (kind, seed); work(kind, seed) -> dict
    finished.of(kind)                             # the dicts of this code, by seed

A run that was stopped goes on where it was: what is in the file with the same code's digest is not run again. Streams
of another code do not count. The processes have the lowest priority, and stand still while the file `pause_while`
exists, so that a measurement beside them is not disturbed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Task = tuple[str, int]
Work = Callable[[str, int], dict[str, Any]]
ROOT = Path(__file__).parents[2]


def digest(*paths: str, **asked: object) -> str:
    """Of the sources there, below the root of the repository, and of what else a stream is asked for."""
    inside = [[ROOT / path] if path.endswith(".py") else (ROOT / path).glob("*.*") for path in paths]
    files = sorted(file for files in inside for file in files if file.suffix in (".py", ".cpp", ".h"))
    whole = hashlib.sha256(repr(sorted(asked.items())).encode())
    for file in files:
        whole.update(f"{file.relative_to(ROOT)} {len(file.read_bytes())}\n".encode() + file.read_bytes())
    return whole.hexdigest()[:16]


def interval(hits: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Clopper and Pearson's exact interval of a probability that was hit so many times in n."""
    if not 0 <= hits <= n or n < 1:
        raise ValueError(f"{hits} of {n} is no share")
    tail = (1 - level) / 2
    low = 0.0 if hits == 0 else _solve(lambda p: 1 - _at_most(hits - 1, n, p), tail)
    high = 1.0 if hits == n else _solve(lambda p: -_at_most(hits, n, p), -tail)
    return low, high


def _at_most(hits: int, n: int, p: float) -> float:
    """Probability of at most so many hits."""
    term = total = 0.0
    for i in range(hits + 1):
        term = (1 - p) ** n if i == 0 else term * (n - i + 1) / i * p / (1 - p)
        total += term
    return total


def _solve(rising: Callable[[float], float], wanted: float) -> float:
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < wanted else (low, middle)
    return (low + high) / 2


@dataclass(slots=True)
class FinishedStreams:
    """file: where lines are appended; None keeps them in memory only. code: the digest of what is measured."""

    file: Path | None
    code: str
    lines: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.file is not None and self.file.exists():
            self.lines = [line for line in _parsed(self.file) if line["code"] == self.code]

    def of(self, kind: str) -> list[dict[str, Any]]:
        """What the streams of a kind came to, by seed."""
        return sorted((line for line in self.lines if line["kind"] == kind), key=lambda line: line["seed"])

    def run(
        self,
        tasks: Sequence[Task],
        work: Work,
        *,
        processes: int = 1,
        pause_while: Path | None = None,
        until: float = float("inf"),
    ) -> None:
        """Those of the tasks that are not finished, in their order. until: no stream begins after it (`time.time`)."""
        done = {(line["kind"], line["seed"]) for line in self.lines}
        left = [task for task in tasks if task not in done]
        began, before = time.time(), len(tasks) - len(left)
        print(f"{len(tasks)} streams, {before} finished before", flush=True)
        spawned = multiprocessing.get_context("spawn")
        jobs = ((work, task, until) for task in left)
        with spawned.Pool(processes, _go_last) as pool, _pausing(pause_while):
            for number, line in enumerate(pool.imap_unordered(_one, jobs), 1):
                if line is None:
                    continue
                self._keep({"code": self.code, **line})
                rate = (time.time() - began) / number
                hours = rate * (len(left) - number) / 3600
                said = f"{before + number} of {len(tasks)}: {line['kind']}, seed {line['seed']}, {line['cpu']:.1f} s"
                print(f"{said} of CPU; {hours:.2f} h left", flush=True)

    def _keep(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a") as out:
                # In a line of its own, also behind one that was cut short.
                out.write(("\n" if out.tell() else "") + json.dumps(line))


def add_options(options: argparse.ArgumentParser, *, streams: int) -> None:
    """What every campaign of streams takes on its command line."""
    options.add_argument("--streams", type=int, default=streams, help="of each kind")
    options.add_argument("--seed", type=int, default=0, help="the first")
    options.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    options.add_argument("--finished", type=Path, help="a file of JSON lines: goes on where it was")
    options.add_argument("--pause-while", type=Path, help="stand still while this file exists")
    options.add_argument("--hours", type=float, default=float("inf"), help="begin no stream after so many")


def run_chosen(finished: FinishedStreams, kinds: Sequence[str], work: Work, chosen: argparse.Namespace) -> None:
    """Run what `add_options` took."""
    finished.run(
        by_turns(kinds, chosen.streams, chosen.seed),
        work,
        processes=chosen.processes,
        pause_while=chosen.pause_while,
        until=time.time() + 3600 * chosen.hours,
    )


def by_turns(kinds: Sequence[str], count: int, first: int) -> list[Task]:
    """A stream of each kind, then the next one of each: whenever it is stopped, each kind has as many."""
    return [(kind, seed) for seed in range(first, first + count) for kind in kinds]


@contextmanager
def _pausing(pause_while: Path | None) -> Iterator[None]:
    """Stop the processes that this one started while the file exists."""
    ended = threading.Event()

    def watch(file: Path) -> None:
        stopped = False
        while not ended.wait(1):
            if file.exists() != stopped:
                stopped = not stopped
                for child in multiprocessing.active_children():
                    os.kill(child.pid or 0, signal.SIGSTOP if stopped else signal.SIGCONT)
        if stopped:
            for child in multiprocessing.active_children():
                os.kill(child.pid or 0, signal.SIGCONT)

    if pause_while is None:
        yield
        return
    watcher = threading.Thread(target=watch, args=(pause_while,), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def _go_last() -> None:
    """The lowest priority. Linux groups processes by session, and a niceness counts within the group only."""
    os.setsid()
    os.nice(19)
    with suppress(OSError):
        Path("/proc/self/autogroup").write_text("19")


def _one(job: tuple[Work, Task, float]) -> dict[str, Any] | None:
    work, (kind, seed), until = job
    if time.time() > until:
        return None
    began = time.process_time()
    outcome = work(kind, seed)
    return {"kind": kind, "seed": seed, **outcome, "cpu": round(time.process_time() - began, 2)}


def _parsed(file: Path) -> Iterator[dict[str, Any]]:
    """The whole lines; one that was cut short by a kill is left out."""
    for line in file.read_text().splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue
