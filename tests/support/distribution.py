"""The wheel and the sdist, built from a copy, so that nothing is left in this folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Literal

from tests.support.server import ROOT

SOURCES = ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "serve", "optimize")


def copy(folder: Path) -> Path:
    """What a distribution is built from, in `folder`."""
    folder.mkdir(parents=True)
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    for file in ROOT.glob("constraints*.txt"):
        shutil.copy(file, folder / file.name)
    return folder


def build(kind: Literal["wheel", "sdist"], source: Path, out: Path) -> Path:
    """A distribution of `source` in `out`, by the setuptools that is installed: nothing is fetched."""
    code = f"import sys; from setuptools.build_meta import build_{kind}; build_{kind}(sys.argv[1])"
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", code, str(out)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (file,) = out.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return file


def unpack(sdist: Path, folder: Path) -> Path:
    """The folder that an sdist holds."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (inner,) = folder.iterdir()
    return inner
