"""What runs inside vLLM's own processes, loaded there through the entry point group `vllm.general_plugins`."""

from __future__ import annotations

import multiprocessing
import os
import select
import threading
from collections.abc import Callable

from serve.cpu_kernels.install import install as install_kernels
from serve.vllm_backend import forkserver, notices, prompt_logprobs, titles


def register() -> None:
    """Called by vLLM once in each of its processes, the one that serves HTTP included."""
    notices.install()
    install_kernels()
    prompt_logprobs.install()
    forkserver.install()
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    titles.install()
    # Ctrl-C in a terminal reaches the whole foreground group; the server drains, so its engine must outlive that.
    os.setpgid(0, 0)
    threading.Thread(target=_follow, args=(parent.sentinel,), daemon=True, name="follow-parent").start()


def _follow(sentinel: int, leave: Callable[[int], object] = os._exit) -> None:
    """End with the parent: a server that was killed leaves no engine behind that holds its memory.

    `sentinel` is the pipe through which this process was told what to do, and may still hold some of it; its other end
    closes with the parent, who need not be the one whom the kernel names: see forkserver.
    """
    closed = select.poll()
    closed.register(sentinel, 0)
    closed.poll()
    leave(1)
