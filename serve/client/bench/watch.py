"""What the machine did during a round, from /proc: the servers, this client, and everybody else.

A figure from a shared machine means little unless one knows how busy the others were. CPU in seconds, memory in bytes.
"""

from __future__ import annotations

import os
import socket
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

_TICK = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_LISTEN = "0A"


@dataclass(frozen=True, slots=True)
class Process:
    """A line of /proc/PID/stat."""

    name: str
    parent: int
    cpu_s: float
    children_cpu_s: float  # of children that have ended and were waited for
    rss: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The machine at one moment."""

    at: float
    busy_s: float
    stolen_s: float
    processes: Mapping[int, Process]

    def tree(self, roots: Iterable[int]) -> set[int]:
        """The processes in `roots`, their children, and so on."""
        children = defaultdict(list)
        for pid, process in self.processes.items():
            children[process.parent].append(pid)
        tree: set[int] = set()
        waiting = [pid for pid in roots if pid in self.processes]
        while waiting:
            pid = waiting.pop()
            if pid not in tree:
                tree.add(pid)
                waiting.extend(children[pid])
        return tree

    def cpu_s(self, pids: Iterable[int]) -> float:
        known = (self.processes[pid] for pid in pids if pid in self.processes)
        return sum(process.cpu_s + process.children_cpu_s for process in known)

    def rss(self, pids: Iterable[int]) -> int:
        return sum(self.processes[pid].rss for pid in pids if pid in self.processes)


@dataclass(frozen=True, slots=True)
class Use:
    """What one round cost the machine, in seconds of CPU."""

    wall_s: float
    server_cpu_s: float | None
    server_rss: int | None
    server_pss: int | None  # shared pages counted once; None where the kernel does not let us see it
    idle_servers_cpu_s: float
    others_cpu_s: float
    stolen_s: float
    busiest: list[tuple[str, float]] = field(default_factory=list)

    @property
    def disturbance(self) -> float:
        """Cores taken from the round by other processes and, in a virtual machine, by its neighbours."""
        return (self.others_cpu_s + self.stolen_s) / self.wall_s if self.wall_s else 0.0

    def disturbed(self, above: float) -> bool:
        # /proc counts in ticks of 10 ms: in a very short round one or two of them are noise.
        return self.disturbance > above and self.others_cpu_s + self.stolen_s > 3 / _TICK


class Watch:
    """Tells the servers' work from the client's and from everybody else's."""

    def __init__(self, roots: Mapping[str, frozenset[int]], proc: Path = Path("/proc")) -> None:
        self._roots = roots
        self._proc = proc
        self._me = os.getpid()

    @property
    def works(self) -> bool:
        return (self._proc / "stat").exists()

    def snapshot(self) -> Snapshot:
        return snapshot(self._proc)

    def between(self, before: Snapshot, after: Snapshot, label: str) -> Use:
        trees = {name: before.tree(roots) | after.tree(roots) for name, roots in self._roots.items()}
        spent = {name: after.cpu_s(tree) - before.cpu_s(tree) for name, tree in trees.items()}
        ours = {self._me}.union(*trees.values())
        asked = trees.get(label) or set()
        idle = set().union(*trees.values()) - asked
        others, busiest = _others(before, after, ours)
        ours_cpu = after.cpu_s(ours) - before.cpu_s(ours)
        unseen = (after.busy_s - before.busy_s) - ours_cpu
        # The kernel samples its totals at ticks and measures processes exactly: only a clear excess is somebody's work.
        unseen -= 0.05 * (after.busy_s - before.busy_s)
        return Use(
            wall_s=after.at - before.at,
            server_cpu_s=round(max(0.0, spent[label]), 3) if asked else None,
            server_rss=after.rss(asked) if asked else None,
            server_pss=_pss(self._proc, asked & after.processes.keys()),
            idle_servers_cpu_s=round(max(0.0, after.cpu_s(idle) - before.cpu_s(idle)), 3),
            others_cpu_s=round(max(0.0, others, unseen), 3),
            stolen_s=round(max(0.0, after.stolen_s - before.stolen_s), 3),
            busiest=busiest,
        )


def snapshot(proc: Path = Path("/proc")) -> Snapshot:
    busy, stolen = _totals(proc)
    processes = {}
    try:
        entries = [int(name) for name in os.listdir(proc) if name.isdigit()]
    except OSError:
        entries = []
    for pid in entries:
        process = _process(proc, pid)
        if process is not None:
            processes[pid] = process
    return Snapshot(perf_counter(), busy, stolen, processes)


def listeners(port: int, proc: Path = Path("/proc")) -> frozenset[int]:
    """The processes that hold a socket listening on `port`; empty when there are none that we may see."""
    sockets = {f"socket:[{inode}]" for inode in _listening(port, proc)}
    holders = set()
    for entry in proc.glob("[0-9]*/fd"):
        try:
            names = os.listdir(entry)
        except OSError:
            continue
        if sockets and any(_link(entry / name) in sockets for name in names):
            holders.add(int(entry.parent.name))
    return frozenset(holders)


def is_local(host: str) -> bool:
    """Whether `host` is this machine: only its own addresses can be bound."""
    try:
        addresses = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)
    except OSError:
        return False
    for family, kind, protocol, _, address in addresses:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.bind(address)
                return True
        except OSError:
            continue
    return False


def machine() -> dict[str, object]:
    """What a reader of the figures needs to know of the hardware."""
    model = ""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        pass
    uname = os.uname()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PHYS_PAGES") * _PAGE
    return {
        "cpu": model,
        "cores": cores,
        "memory": memory,
        "system": f"{uname.sysname} {uname.release} {uname.machine}",
    }


def _others(before: Snapshot, after: Snapshot, ours: set[int]) -> tuple[float, list[tuple[str, float]]]:
    """CPU of all other processes, and the three busiest by name."""
    total = 0.0
    by_pid = {}
    for pid in before.processes.keys() | after.processes.keys():
        if pid in ours:
            continue
        spent = after.cpu_s([pid]) - before.cpu_s([pid])  # negative for one that ended: its parent holds that time now
        total += spent
        if pid in after.processes:
            # Its own work only: an init that reaps somebody's old process has not done that work.
            by_pid[pid] = after.processes[pid].cpu_s - (before.processes[pid].cpu_s if pid in before.processes else 0.0)
    busiest = sorted(by_pid, key=by_pid.__getitem__, reverse=True)[:3]
    named = [(after.processes[pid].name, round(by_pid[pid], 3)) for pid in busiest if by_pid[pid] > 0]
    return total, named


def _totals(proc: Path) -> tuple[float, float]:
    try:
        with open(proc / "stat") as lines:
            numbers = [int(word) for word in lines.readline().split()[1:9]]
    except (OSError, ValueError):
        return 0.0, 0.0
    user, nice, system, _idle, _iowait, _irq, _softirq, stolen = (numbers + [0] * 8)[:8]
    # Interrupts are left out: on loopback they are this benchmark's own traffic.
    return (user + nice + system) / _TICK, stolen / _TICK


def _process(proc: Path, pid: int) -> Process | None:
    try:
        with open(proc / str(pid) / "stat") as file:
            head, _, rest = file.read().rpartition(")")
    except OSError:
        return None
    words = rest.split()
    return Process(
        name=head.partition("(")[2],
        parent=int(words[1]),
        cpu_s=(int(words[11]) + int(words[12])) / _TICK,
        children_cpu_s=(int(words[13]) + int(words[14])) / _TICK,
        rss=int(words[21]) * _PAGE,
    )


def _pss(proc: Path, pids: Iterable[int]) -> int | None:
    total = 0
    for pid in pids:
        try:
            lines = (proc / str(pid) / "smaps_rollup").read_text().splitlines()
            total += next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
        except (OSError, StopIteration):
            return None
    return total or None


def _listening(port: int, proc: Path) -> set[str]:
    wanted = f":{port:04X}"
    inodes = set()
    for table in ("tcp", "tcp6"):
        try:
            rows = (proc / "net" / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for words in map(str.split, rows):
            if words[1].endswith(wanted) and words[3] == _LISTEN:
                inodes.add(words[9])
    return inodes


def _link(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
