"""Programs of others in a folder of their own, beside loradock's environment: no other test sees what they bring.

trl 1.16.0 (Apache-2.0), lm-eval 0.4.13 and instructor 1.17.0 (MIT), with what they need beside vLLM, by hash:
`requirements.txt` here and serve/cli/requirements/lm-eval.txt. Installed when first
asked for (some seconds), and kept in the environment.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
LISTS = (ROOT / "serve/cli/requirements/lm-eval.txt", Path(__file__).with_name("requirements.txt"))
# 400 MB that no test of theirs reaches, or that is in the environment already.
LEFT_OUT = {"joblib", "narwhals", "nltk", "pyarrow", "rouge-score", "scikit-learn", "scipy", "threadpoolctl"}


def requirements() -> str:
    """What pip takes, with the hash of each file."""
    text = "".join(file.read_text() for file in LISTS)
    packages = re.findall(r"^[^#\s].*\n(?:[ ]+.*\n)*", text, re.M)
    return "".join(package for package in packages if package.partition("==")[0] not in LEFT_OUT)


def installed() -> Path:
    """The folder that PYTHONPATH names for them."""
    wanted = requirements()
    key = f"{wanted} {sys.version} {platform.machine()}".encode()
    folder = Path(sys.prefix) / "foreign" / hashlib.sha256(key).hexdigest()[:16]
    if folder.exists():
        return folder
    folder.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=folder.parent) as name:
        made, file = Path(name, "made"), Path(name, "requirements.txt")
        file.write_text(wanted)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--require-hashes"]
        command = [*pip, "--target", str(made), "-r", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"pip cannot install TRL, lm-eval and instructor:\n{done.stderr[-2000:]}"
        with suppress(OSError):  # another run was faster
            os.rename(made, folder)
    return folder


def run(
    module: str,
    *words: str | Path,
    folder: Path,
    timeout: float = 180,
    package: str = "tests.support.foreign",
    **environ: str,
) -> Any:
    """What a program of the package printed as its last line, as JSON. It runs in `folder`, and never asks the hub."""
    own = {"PYTHONPATH": f"{installed()}{os.pathsep}{ROOT}", "HF_HOME": str(folder), "HF_HUB_OFFLINE": "1"}
    clean = {key: value for key, value in os.environ.items() if not key.startswith("LORADOCK_")}
    environ = {**clean, **own, **environ}
    command = [sys.executable, "-m", f"{package}.{module}", *map(str, words)]
    done = subprocess.run(
        command,
        cwd=folder,
        env=environ,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    return json.loads(done.stdout.splitlines()[-1])
