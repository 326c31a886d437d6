"""A second start does not read the source of all models, and knows when one has changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from transformers.utils.import_utils import create_import_structure_from_path

from serve.vllm_backend import package_scans

# Modules of which the source is read although they are not imported.
PROGRAM = """
import json, sys
read = []
sys.addaudithook(lambda event, args: read.append(str(args[0])) if event == "open" else None)
from serve.vllm_backend import package_scans
package_scans.install()
import transformers
from transformers.utils import import_utils
models = [path for path in read if "/transformers/models/" in path and path.endswith(".py")]
lists = [path for path in read if path.endswith("RECORD")]
known = [transformers.LlamaConfig.__name__, import_utils.PACKAGE_DISTRIBUTION_MAPPING["transformers"]]
print(json.dumps({"models": len(models), "lists": len(lists), "known": known}))
"""


def start(cache: Path) -> dict:
    environ = {**os.environ, "LORADOCK_CACHE_DIR": str(cache)}
    ended = subprocess.run([sys.executable, "-c", PROGRAM], env=environ, capture_output=True, text=True, check=True)
    return json.loads(ended.stdout.splitlines()[-1])


def test_a_second_start_reads_no_source_of_models_and_no_lists_of_files(tmp_path):
    first, second = start(tmp_path), start(tmp_path)
    assert first["models"] > 500
    assert (second["models"], second["lists"]) == (0, 0)
    assert first["known"] == second["known"] == ["LlamaConfig", ["transformers"]]


@pytest.fixture
def models(tmp_path, monkeypatch):
    monkeypatch.setenv("LORADOCK_CACHE_DIR", str(tmp_path / "cache"))
    folder = tmp_path / "models"
    (folder / "llama").mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "llama" / "modeling_llama.py").write_text('__all__ = ["Llama"]\n')
    return folder


def structure(models: Path):
    create_import_structure_from_path.cache_clear()
    return package_scans._of_models(create_import_structure_from_path, models)(models)


def test_a_changed_model_is_read_again(models):
    before = structure(models)
    (models / "llama" / "modeling_llama.py").write_text('__all__ = ["Llama", "LlamaForScores"]\n')
    create_import_structure_from_path.cache_clear()
    assert structure(models) == create_import_structure_from_path(models) != before


@pytest.mark.parametrize("content", [b"", b"x" * 40, "half"])
def test_what_is_kept_and_cannot_be_read_is_found_out_again(models, tmp_path, content):
    before = structure(models)
    kept = tmp_path / "cache" / "imports" / "models"
    kept.write_bytes(kept.read_bytes()[:-5] if content == "half" else content)
    assert structure(models) == before


def test_nothing_has_to_be_kept(models, tmp_path):
    (tmp_path / "cache").write_text("a file in the way")
    assert structure(models) == create_import_structure_from_path(models)
