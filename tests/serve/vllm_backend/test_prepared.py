"""What is changed in vLLM before processes are forked is not looked for again in what was forked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from vllm.platforms import current_platform

if not current_platform.is_cpu():
    pytest.skip("on a CPU alone", allow_module_level=True)

PROGRAM = """
import json, os, sys, threading, types

os.environ |= {"LORADOCK_FORKSERVER": "1", "LD_PRELOAD": ""}
import serve.vllm_backend.preload
import serve.vllm_backend.prepared
import serve.server.launch
serve.server.launch._import_server()
threads = threading.active_count()

from vllm.platforms import current_platform
from serve.vllm_backend import plugin
from serve.vllm_backend.patches import titles
from vllm.v1.worker.block_table import ComputeSlotMappingKernel

before, looked = set(sys.modules), []


class Watched(types.ModuleType):
    def __getattribute__(self, name):
        looked.append(name)
        return super().__getattribute__(name)


sys.modules["vllm.watched"] = Watched("vllm.watched")
looked.clear()
# As in an engine, its worker and the server.
plugin.install()
titles.install()
current_platform.register_triton_kernel_overrides()
from serve.server.assembly import build_app
from serve.vllm_backend.backend import VLLMBackend, prepare
prepare()
forked = {
    "threads": threads,
    "looked": looked,
    "imported": sorted(set(sys.modules) - before - {"vllm.watched"}),
    "kernel": type(ComputeSlotMappingKernel.kernel).__name__,
    "title": sys.modules["vllm.utils.system_utils"].set_process_title is titles.show,
    "context": sys.modules["vllm.v1.engine.utils"].get_mp_context.__module__,
}
print(json.dumps(forked))
"""


def test_a_forked_process_looks_through_no_modules_and_imports_nothing():
    root = Path(__file__).parents[3]
    environ = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environ, cwd=root, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["threads"] == 1, "a process with threads cannot be forked"
    assert not found["looked"], "each look makes a copy of a page"
    assert not found["imported"]
    assert found["title"] and found["context"] == "serve.vllm_backend.forkserver"
    assert found["kernel"] == "KernelOverride"
