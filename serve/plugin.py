"""What runs inside vLLM's own processes, loaded there through the entry point group `vllm.general_plugins`."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time

from serve import lora_cpu

WATCH_SECONDS = 0.5


def register() -> None:
    """Called by vLLM once in each of its processes, the one that serves HTTP included."""
    lora_cpu.install()
    if multiprocessing.parent_process() is None:
        return
    # Ctrl-C in a terminal reaches the whole foreground group; the server drains, so its engine must outlive that.
    os.setpgid(0, 0)
    threading.Thread(target=_follow, args=(os.getppid(),), daemon=True, name="follow-parent").start()


def _follow(parent: int) -> None:
    """End with the parent: a server that was killed leaves no engine behind that holds its memory."""
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
    os._exit(1)
