"""optimum in an environment of its own: it needs transformers 4, and the engine transformers 5.

Five packages lie in a folder of the cache, pinned with the hash of each file, and come before the installed ones in a
process of optimum's; torch, onnx and onnxruntime are shared.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optimize.errors import OptimizeError, Refused
from optimize.export import layout, optimum_export
from optimize.processes import ProcessGroup

REQUIREMENTS = Path(__file__).parents[1] / "requirements" / "optimum.txt"
FAMILIES = "families.json"
SETUP = "loradock optimize setup-optimum"


def home() -> Path:
    """Where the packages are: a folder for each set of them."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loradock"
    pins = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()[:12]
    return cache / "optimum" / f"{pins}-python{sys.version_info.major}.{sys.version_info.minor}"


def families() -> frozenset[str]:
    """The model types that optimum exports, by its TasksManager; Refused where it is not set up."""
    file = home() / FAMILIES
    if not file.is_file():
        raise Refused(f"optimum is not set up on this machine: run `{SETUP}` once, which installs 16 MB from PyPI")
    return frozenset(json.loads(file.read_text()))


def set_up() -> Path:
    """The folder, made if it is not there; it appears whole."""
    where = home()
    if (where / FAMILIES).is_file():
        return where
    where.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=where.parent, prefix="part-"))
    try:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--require-hashes", "--no-compile"]
        _run([*command, "--disable-pip-version-check", "--target", str(aside), "-r", str(REQUIREMENTS)], {}, "pip")
        found = json.loads(_asked(aside, "families")[-1])
        (aside / FAMILIES).write_text(json.dumps(found))
        try:
            aside.rename(where)
        except OSError:  # another process was first
            if not (where / FAMILIES).is_file():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return where


def export(model: Path, out: Path) -> list[str]:
    """The model's graph in `out`, in fp32; what optimum's validation says against it."""
    families()
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        _as_transformers_4(model, Path(folder))
        said: list[str] = json.loads(_asked(home(), "export", folder, str(out))[-1])
    graph = out / "model.onnx"
    if not graph.is_file():
        raise OptimizeError(f"optimum wrote no model.onnx but {', '.join(sorted(file.name for file in out.iterdir()))}")
    for file in out.iterdir():
        if not file.name.startswith("model.onnx"):
            file.unlink()
    return said


def _as_transformers_4(model: Path, folder: Path) -> None:
    """The model under the config and tokenizer that transformers 4 reads; its weights are links."""
    for file in model.iterdir():
        if file.name in ("config.json", layout.TOKENIZER):
            legacy = layout.legacy if file.name == "config.json" else layout.legacy_tokenizer
            (folder / file.name).write_text(json.dumps(legacy(json.loads(file.read_text()))))
        elif file.is_file():
            (folder / file.name).symlink_to(file.resolve())


def environment(packages: Path | None = None) -> dict[str, str]:
    """The variables of a process that imports optimum's packages."""
    return {"PYTHONPATH": str(packages or home()), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}


def _asked(packages: Path, *words: str) -> list[str]:
    # -P: `optimum` is the package, not this file beside the script.
    command = [sys.executable, "-P", str(Path(optimum_export.__file__)), *words]
    return _run(command, environment(packages), "optimum").splitlines()


def _run(command: list[str], environ: Mapping[str, Any], who: str) -> str:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with ProcessGroup() as group:
        process = group.start(command, env={**os.environ, **environ}, text=True, **pipes)
        out, errors = process.communicate()
    if process.returncode:
        said = (errors.strip() or out.strip()).splitlines()[-3:]
        raise OptimizeError(f"{who} failed with exit code {process.returncode}: {' '.join(said)[:600]}")
    return str(out)
