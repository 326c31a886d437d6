"""An export that is not what its manifest says does not start; what is no weight may be changed on purpose."""

import hashlib
import json
import logging

import pytest

from serve.config import load
from serve.errors import ConfigError
from serve.models import checkpoint
from serve.models.checkpoint import verify, verify_weights
from serve.server.launch import resolved


@pytest.fixture
def export(tmp_path):
    files = {"config.json": b"{}", "model.safetensors": b"weights", "README.md": b"a card"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    said = {"files": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}}
    (tmp_path / "manifest.json").write_text(json.dumps(said))
    return tmp_path


def test_an_export_as_it_was_made_is_taken_without_a_word(export, caplog):
    verify(str(export))
    verify_weights(str(export), export / "cache")
    assert not caplog.records


def test_other_weights_are_refused_and_so_are_none(export):
    (export / "model.safetensors").write_bytes(b"Weights")
    with pytest.raises(ConfigError, match="model.safetensors in .* is not the file that its manifest.json names"):
        verify_weights(str(export), export / "cache")
    with pytest.raises(ConfigError, match="is not the file that its manifest.json names: copy or export it again"):
        resolved(load([str(export)], {}))
    (export / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="lacks model.safetensors"):
        verify_weights(str(export), export / "cache")


def test_another_card_is_a_warning_at_the_start_and_stops_a_swap(export, caplog):
    (export / "README.md").write_text("mine")
    with caplog.at_level(logging.WARNING, "loradock"):
        verify_weights(str(export), export / "cache")
    assert "README.md in" in caplog.text
    with pytest.raises(ConfigError, match="README.md in"):
        verify(str(export))


def test_weights_are_read_once_and_again_when_a_file_is_another(export, monkeypatch):
    cache, read = export / "cache", []
    digest = checkpoint._sha256
    monkeypatch.setattr(checkpoint, "_sha256", lambda file: (read.append(file.name), digest(file))[1])
    verify_weights(str(export), cache)
    verify_weights(str(export), cache)
    assert sorted(read) == ["README.md", "config.json", "model.safetensors"]
    aside = export.with_name("aside")
    aside.write_bytes(b"Weights")
    aside.replace(export / "model.safetensors")
    for _ in range(2):
        with pytest.raises(ConfigError, match="is not the file that its manifest"):
            verify_weights(str(export), cache)


def test_a_cache_that_cannot_be_written_stops_no_start(export):
    verify_weights(str(export), export / "README.md")
    assert (export / "README.md").read_bytes() == b"a card"


@pytest.mark.parametrize("manifest", ["{", "[]", '{"files": 5}'])
def test_a_manifest_that_cannot_be_read_stops_no_start(manifest, export):
    (export / "manifest.json").write_text(manifest)
    verify_weights(str(export), export / "cache")
    assert (export / "cache").exists() == (manifest != "{")  # what could not be read is not remembered as right
