"""Imported once, after `preload` and before processes are forked: what all of them change in vLLM is changed already.

Python writes into whatever it looks at, a count of references. A forked process that imports on, or looks through all
modules, gets memory of its own for what it shared: 190 MB in an engine, 100 MB in a server.
"""

from contextlib import suppress
from importlib import import_module

from serve.cpu_kernels import pages
from serve.vllm_backend import plugin, preload
from serve.vllm_backend.patches import applying, titles

with suppress(applying.PatchError):  # whoever starts an engine says what does not fit
    plugin.install()
    if applying.is_on("triton-overrides"):
        preload.register_kernels()
    if applying.is_on("lora-kernels"):
        import_module("serve.cpu_kernels.punica")
titles.find()
pages.release()
