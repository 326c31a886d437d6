"""A program that becomes another one, behind all others on this machine: `lowest_priority.py PARENT NICE COMMAND ...`.

It ends with the thread that started it, at the lowest priority it runs when nothing else wants the processor, and it is
the first to go when memory runs out. Imports nothing of loradock.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
LOWEST = 19


def main(parent: int, nice: int, command: list[str]) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)  # it was gone before the kernel knew
    try:
        os.nice(nice)
        if nice == LOWEST:
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    except (OSError, AttributeError):
        pass  # a container may forbid it: nice alone then
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    except OSError:
        pass
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
