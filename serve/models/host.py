"""What the kernel's files say of a machine: processor, cores, memory, control group, huge pages, NVIDIA driver."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Host:
    """A machine by its files in /proc, /sys and /dev, which lie below `root`."""

    root: Path = Path("/")
    architecture: str = platform.machine()

    def processor(self) -> str:
        """Its name; the architecture where the kernel gives no name."""
        return self._cpuinfo("model name") or self.architecture

    def instructions(self) -> frozenset[str]:
        """Instruction set extensions, by the kernel's names: `avx512_bf16`, `amx_int8`, ..."""
        return frozenset((self._cpuinfo("flags") or self._cpuinfo("Features")).split())

    def cores(self) -> int:
        """Cores that the kernel knows; see `os.sched_getaffinity` for those that a process may use."""
        return len(re.findall(r"^processor\s*:", self._text("proc/cpuinfo"), re.MULTILINE))

    def core_limit(self) -> float | None:
        """Cores' worth of time that the control group allows; None without a limit."""
        limits = []
        for folder in self._groups("cpu"):
            quota, _, period = self._text(folder / "cpu.max").strip().partition(" ")
            if not quota:
                quota = self._text(folder / "cpu.cfs_quota_us").strip()
                period = self._text(folder / "cpu.cfs_period_us").strip()
            if quota.isdigit() and period.isdigit():  # `max` and -1 are no limit
                limits.append(int(quota) / int(period))
        return min(limits, default=None)

    def total_memory(self) -> int:
        """Bytes of memory, the control group's limit included."""
        limits = [limit for limit, _ in self._memory_limits()]
        return min([self._meminfo("MemTotal"), *limits])

    def free_memory(self) -> int:
        """Bytes that a new process could take without swapping, the control group's limit included."""
        left = [max(limit - used, 0) for limit, used in self._memory_limits()]
        return min([self._meminfo("MemAvailable"), *left])

    def huge_pages(self) -> str:
        """When the kernel gives transparent huge pages: always, madvise or never; empty where it has none."""
        chosen = re.search(r"\[(\w+)\]", self._text("sys/kernel/mm/transparent_hugepage/enabled"))
        return chosen[1] if chosen else ""

    def nvidia_driver(self) -> str:
        """The version of the kernel's NVIDIA driver; empty without one."""
        version = re.search(r"NVRM version:.*?\s(\d+\.\d+(?:\.\d+)?)\s", self._text("proc/driver/nvidia/version"))
        return version[1] if version else ""

    def gpus(self) -> list[str]:
        """NVIDIA GPUs whose devices are here, by name; the driver of a host shows GPUs that a container may not use."""
        devices = sorted((self.root / "dev").glob("nvidia[0-9]*"))
        named = sorted((self.root / "proc/driver/nvidia/gpus").glob("*/information"))
        names = [re.search(r"^Model:\s*(.+)$", self._text(file), re.MULTILINE) for file in named]
        known = [name[1].strip() for name in names if name]
        return known if len(known) == len(devices) else [f"NVIDIA GPU {device.name[6:]}" for device in devices]

    def _text(self, path: str | Path) -> str:
        try:
            return (self.root / path).read_text(errors="replace")
        except OSError:
            return ""

    def _cpuinfo(self, row: str) -> str:
        line = re.search(rf"^{row}\s*:\s*(.*)$", self._text("proc/cpuinfo"), re.MULTILINE)
        return line[1].strip() if line else ""

    def _meminfo(self, row: str) -> int:
        line = re.search(rf"^{row}:\s*(\d+) kB$", self._text("proc/meminfo"), re.MULTILINE)
        return int(line[1]) * 1024 if line else sys.maxsize

    def _memory_limits(self) -> Iterator[tuple[int, int]]:
        """(limit, used) in bytes of each control group that this process is in."""
        for folder in self._groups("memory"):
            for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
                texts = self._text(folder / limit).strip(), self._text(folder / used).strip()
                # Version 1 writes a number near 2^63 where there is no limit.
                if all(text.isdigit() for text in texts) and int(texts[0]) < 1 << 60:
                    yield int(texts[0]), max(int(texts[1]) - self._cached(folder), 0)

    def _cached(self, folder: Path) -> int:
        """Bytes of files in memory that the kernel drops when somebody needs the room."""
        rows = dict(line.split() for line in self._text(folder / "memory.stat").splitlines())
        return int(rows.get("total_inactive_file", rows.get("inactive_file", 0)))

    def _groups(self, controller: str) -> Iterator[Path]:
        """The folder of this process's control group and of every group around it; a limit may stand in any."""
        for line in self._text("proc/self/cgroup").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            top = Path("sys/fs/cgroup", *([controller] if controllers else []))
            inner = top / path.lstrip("/")
            # In a container the path may be the host's, of which only the top is visible.
            yield from [inner, *(folder for folder in inner.parents if folder.is_relative_to(top))]
