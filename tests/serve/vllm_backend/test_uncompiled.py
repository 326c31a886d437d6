"""vLLM without torch's compiler: nothing that is computed is another, and who asks for the compiler has it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

pytest.importorskip("vllm")

from serve.models import hardware
from serve.vllm_backend import uncompiled
from tests.support.server import ROOT, environment


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_ranks_are_counted_as_vllm_counts_them(monkeypatch, rows):
    monkeypatch.setattr(uncompiled, "CELLS", 300)
    x = torch.randn(rows, 100).log_softmax(-1)
    values = x.gather(-1, torch.randint(100, (rows, 1)))
    assert torch.equal(uncompiled.count_greater(print, x, values), (x >= values).sum(-1))


def test_what_vllm_would_compile_is_compiled_when_it_is_called(monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: seen.append(options) or function)

    @uncompiled._later(backend="inductor", dynamic=True)
    def twice(x):
        return 2 * x

    assert not seen
    assert twice(2) == 4 and twice(3) == 6
    assert seen == [{"backend": "inductor", "dynamic": True}]


@pytest.mark.skipif(not hardware.on_cpu(), reason="on a GPU nothing is imported beforehand")
def test_the_compiler_is_not_imported_and_can_be():
    code = """
import serve.vllm_backend.preload, sys, torch
found = [name for name in sys.modules if name.startswith(("torch._dynamo", "torch._inductor."))]
assert not found, found
torch._dynamo.decorators.mark_unbacked(torch.ones(2), 0)
assert "torch._dynamo" not in sys.modules
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)) == 2
assert torch._dynamo is sys.modules["torch._dynamo"]
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
