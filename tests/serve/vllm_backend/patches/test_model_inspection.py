"""vLLM's process that looks at a model's class starts beside audio packages that cannot be imported."""

from __future__ import annotations

import os

import pytest

from serve.models import audio_packages
from serve.vllm_backend.patches import model_inspection
from tests.support.audio import for_cuda
from tests.support.server import ROOT

registry = pytest.importorskip("vllm.model_executor.models.registry")


def test_vllm_looks_at_a_model_beside_a_torchaudio_for_cuda(monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "_SUBPROCESS_COMMAND", before := list(registry._SUBPROCESS_COMMAND))
    monkeypatch.setenv("PYTHONPATH", f"{for_cuda(tmp_path)}{os.pathsep}{ROOT}")
    model_inspection.install()
    assert before == registry._SUBPROCESS_COMMAND, "nothing is in the way in this process"
    monkeypatch.setattr(audio_packages, "unusable", lambda: ["torchaudio"])
    model_inspection.install()
    assert registry._run_in_subprocess(lambda: __import__("transformers.audio_utils").__name__) == "transformers"
