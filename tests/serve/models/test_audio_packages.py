"""What cannot be imported beside torch's CPU build looks absent."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from serve.models.audio_packages import unusable
from tests.support.audio import for_cuda
from tests.support.server import ROOT


def machine(**versions: str):
    return lambda name: versions.get(name, "")


def test_only_cuda_builds_beside_a_cpu_torch_are_unusable():
    assert unusable(machine(torch="2.13.0+cpu", torchaudio="2.11.0", torchcodec="0.14.0")) == [
        "torchaudio",
        "torchcodec",
    ]
    assert unusable(machine(torch="2.13.0+cpu", torchaudio="2.11.0+cpu")) == []
    assert unusable(machine(torch="2.13.0", torchaudio="2.11.0", torchcodec="0.14.0")) == []
    assert unusable(machine()) == []


@pytest.mark.parametrize(
    "hide",
    [
        "import serve.models.audio_packages as package; package.hide()",
        "import optimize.audio_packages as package; package.hide()",
        "import serve.vllm_backend",
    ],
)
def test_an_audio_package_that_wants_cuda_is_not_found_by_those_who_look_for_it(tmp_path, hide):
    code = (
        "import importlib.util\n"
        "assert importlib.util.find_spec('torchaudio') is not None\n"
        f"{hide}\n"
        "assert importlib.util.find_spec('torchaudio') is None\n"
        "try: import torchaudio\n"
        "except ImportError: print('absent')\n"
    )
    environ = {**os.environ, "PYTHONPATH": f"{for_cuda(tmp_path)}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environ, capture_output=True, text=True, check=False
    )
    assert done.stdout == "absent\n", done.stderr
