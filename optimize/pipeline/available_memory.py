"""How much memory a step may have."""

from __future__ import annotations

import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def available_memory() -> int:
    """Four fifths of what is left to this process: of the machine's, and of each control group's that it is in."""
    left = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 5 // 8
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            left = int(line.split()[1]) * 1024
    groups = Path("/proc/self/cgroup")
    return min([left, *(left_in_groups(groups.read_text(), CGROUPS) if groups.is_file() else [])]) * 4 // 5


def left_in_groups(membership: str, mounted: Path) -> list[int]:
    """What each limited control group has left, of either version; `membership` is /proc/self/cgroup's text."""
    left = []
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = mounted / "memory" if controllers else mounted
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        group = top / path.lstrip("/")
        for folder in [group, *group.parents]:
            if not folder.is_relative_to(top):
                break
            try:
                limit, used = ((folder / name).read_text().strip() for name in names)
                statistics = (folder / "memory.stat").read_text().splitlines()
            except OSError:
                continue  # the root has no limit, and a container does not see what is above it
            if limit != "max":
                # Pages of files can be taken back.
                files = sum(int(row.split()[1]) for row in statistics if row.startswith("inactive_file "))
                left.append(max(0, int(limit) - int(used) + files))
    return left
