"""What cannot be imported beside torch's CPU build looks absent."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from serve.models.audio_packages import unusable


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


@pytest.mark.parametrize("package", ["serve.models.audio_packages", "optimize.pipeline.audio_packages"])
def test_an_audio_package_that_wants_cuda_is_not_found_by_those_who_look_for_it(tmp_path, package):
    for name, version in (("torch", "2.13.0+cpu"), ("torchaudio", "2.11.0")):
        info = tmp_path / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (tmp_path / "torchaudio.py").write_text("raise OSError('libc10_cuda.so: cannot open shared object file')\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        f"import importlib.util, {package} as package\n"
        "assert importlib.util.find_spec('torchaudio') is not None\n"
        "package.hide()\n"
        "assert importlib.util.find_spec('torchaudio') is None\n"
        "try: import torchaudio\n"
        "except ImportError: print('absent')\n"
    )
    root = Path(importlib.util.find_spec("serve").origin).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.stdout == "absent\n", done.stderr
