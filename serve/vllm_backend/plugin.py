"""What runs inside vLLM's own processes, loaded there through the entry point group `vllm.general_plugins`."""

from __future__ import annotations

import multiprocessing
import os
import threading

from serve.cpu_kernels.install import install as install_kernels
from serve.models import hardware
from serve.vllm_backend import forkserver, notices
from serve.vllm_backend.patches import applying, media, model_inspection, titles

_installed = False


def install() -> None:
    """Change in vLLM what is the same in all of its processes, once: what was forked since is changed as well."""
    global _installed
    if _installed:
        return
    model_inspection.install()
    if hardware.on_cpu():
        install_kernels()
    media.install()
    applying.install("all")
    if applying.is_on("fork-server"):
        forkserver.install()
    elif forkserver.wanted():
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # this process has threads by then
    _installed = True


def register() -> None:
    """Called by vLLM once in each of its processes, the one that serves HTTP included."""
    notices.install()
    install()
    if hardware.on_cpu():
        from serve.cpu_kernels import gguf_weights

        gguf_weights.register()
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    if applying.is_on("titles"):
        titles.install()
    # Ctrl-C in a terminal reaches the whole foreground group; the server drains, so its engine must outlive that.
    os.setpgid(0, 0)
    threading.Thread(target=forkserver.follow, args=(parent.sentinel,), daemon=True, name="follow-parent").start()
