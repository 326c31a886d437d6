"""What runs inside vLLM's own processes, loaded there through the entry point group `vllm.general_plugins`."""

from __future__ import annotations

import multiprocessing
import os
import threading

from serve import forkserver, lora_cpu


def register() -> None:
    """Called by vLLM once in each of its processes, the one that serves HTTP included."""
    lora_cpu.install()
    forkserver.install()
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    # Ctrl-C in a terminal reaches the whole foreground group; the server drains, so its engine must outlive that.
    os.setpgid(0, 0)
    threading.Thread(target=_follow, args=(parent,), daemon=True, name="follow-parent").start()


def _follow(parent: multiprocessing.process.BaseProcess) -> None:
    """End with the parent: a server that was killed leaves no engine behind that holds its memory."""
    parent.join()
    os._exit(1)
