"""Programs for arm64 on this machine: Debian's cross compiler makes them, and qemu-user runs them.

`python_with_torch` is an interpreter of Debian's and PyPI's torch, unpacked into a folder and not installed. It takes
a minute, the first time, and Debian's mmdebstrap.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMPILER, EMULATOR, UNPACKER = "aarch64-linux-gnu-g++", "qemu-aarch64", "mmdebstrap"
# PyPI has it for arm64 without CUDA; and what it imports.
TORCH = (
    "torch==2.9.1",
    *("filelock", "fsspec", "jinja2", "markupsafe", "mpmath", "networkx", "sympy", "typing-extensions"),
)


def lacking(*programs: str) -> str:
    """Which of these is not installed here, in words; "" if they all are."""
    names = ", ".join(name for name in programs if shutil.which(name) is None)
    return f"not installed: {names}" if names else ""


def run(processor: str, root: Path, *command: str | Path, **environ: str) -> str:
    """What a program prints on that processor, with its libraries below `root`; what it starts is this machine's."""
    clean = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    words = [EMULATOR, "-cpu", processor, "-L", str(root), *map(str, command)]
    done = subprocess.run(words, cwd=ROOT, env={**clean, **environ}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout


def python_with_torch() -> Path:
    """The folder that the interpreter takes for /; torch is in its /torch."""
    folder = Path(sys.prefix) / "arm64" / TORCH[0]
    if folder.exists():
        return folder
    folder.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=folder.parent) as name:
        made = Path(name, "made")
        _do(UNPACKER, "--variant=extract", "--arch=arm64", "--include=python3,libstdc++6", "trixie", str(made))
        if not (made / "lib").exists():
            (made / "lib").symlink_to("usr/lib")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(made / "torch")]
        kind = [f"--platform={name}_aarch64" for name in ("manylinux_2_28", "manylinux2014")]
        _do(*pip, *kind, "--only-binary=:all:", "--python-version=3.13", *TORCH)
        with suppress(OSError):  # another run was faster
            os.rename(made, folder)
    return folder


def _do(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command[0]} fails:\n{done.stderr[-2000:]}"
