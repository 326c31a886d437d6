"""torch's compiler is not imported before something is compiled, and then everything is as if it had been."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import util

import pytest

pytest.importorskip("vllm")

from vllm.platforms import current_platform

from serve.vllm_backend import deferred_compiler

if not current_platform.is_cpu():
    pytest.skip("on a CPU alone", allow_module_level=True)

# What a server imports; then a function that is compiled, with one in it that is not to be.
DEFERRED = """
import json, os, sys
import serve.vllm_backend.preload
import serve.vllm_backend.prepared
import serve.server.launch
serve.server.launch._import_server()
import torch
import vllm.compilation.decorators as decorators
from vllm.v1.sample.sampler import Sampler

apart = torch.compiler.disable(lambda x: x * 2)
marked = torch.compiler.allow_in_graph(lambda x: x)
graphs = []


def backend(graph, inputs):
    graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
    return graph.forward


@torch.compile(backend=backend)
def compiled(x):
    return apart(x + 1) - 3


plain = apart(torch.ones(1)).item()
Sampler.gather_logprobs(torch.zeros(2, 8).log_softmax(-1), 2, torch.zeros(2, dtype=torch.int64))
before = sorted(name for name in sys.modules if name.startswith("torch._dynamo"))
answer = compiled(torch.ones(1)).item()
translator = decorators.InliningInstructionTranslator
from torch._dynamo import trace_rules
from torch._inductor import graph, lowering

print(json.dumps({
    "before": before,
    "answers": [plain, answer],
    "graphs": len(graphs),
    "translator": translator is sys.modules["torch._dynamo.symbolic_convert"].InliningInstructionTranslator,
    "marked": trace_rules.is_callable_allowed(marked),
    "vllm's": ["vllm::anything" in module.FALLBACK_ALLOW_LIST for module in (lowering, graph)],
    "artifact": type(torch._inductor.CompiledArtifact).__name__ != "_Placeholder",
    "stock": torch.compile.__module__ == torch.compiler.disable.__module__.partition(".")[0] == "torch",
}), flush=True)
os._exit(0)
"""
# Where it is imported as ever.
STOCK = """
import json, os, sys
from serve.vllm_backend import deferred_compiler
import torch
stock = torch.compile, torch.compiler.disable
if "unread" in sys.argv:  # a release of vLLM that nobody has read
    deferred_compiler.READ = frozenset()
deferred_compiler.install()
same = stock == (torch.compile, torch.compiler.disable)
print(json.dumps({"stock": same, "attribute": "_dynamo" in vars(torch)}), flush=True)
os._exit(0)
"""


def run(program: str, *words: str, **environ: str) -> dict:
    environment = {**os.environ, **environ}
    ended = subprocess.run(
        [sys.executable, "-c", program, *words], env=environment, capture_output=True, text=True, check=False
    )
    assert ended.stdout, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.skipif(any(map(util.find_spec, deferred_compiler.TRITON)), reason="Triton imports it")
def test_a_server_imports_the_compiler_when_something_is_compiled():
    assert run(DEFERRED, LORADOCK_FORKSERVER="1", LD_PRELOAD="") == {
        "before": [],
        "answers": [2, 1],
        "graphs": 2,
        "translator": True,
        "marked": True,
        "vllm's": [True, True],
        "artifact": True,
        "stock": True,
    }


def test_a_release_that_nobody_has_read_imports_the_compiler_as_ever():
    assert run(STOCK, "unread") == {"stock": True, "attribute": False}


def test_triton_imports_the_compiler_as_ever(tmp_path):
    """With PyPI's plain torch, which brings it, the server did not start."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").touch()
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    assert run(STOCK, PYTHONPATH=path) == {"stock": True, "attribute": False}


def test_the_installed_release_has_been_read():
    assert deferred_compiler._is_read()
