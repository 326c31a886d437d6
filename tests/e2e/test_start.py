"""A start that cannot work says in one sentence what to do, and ends: no traceback, no engine, no waiting."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from tests.support.server import loradock

pytestmark = pytest.mark.timeout(120)


def sentence(*arguments: str | Path, **environ: str) -> str:
    """The one sentence of a server that did not start."""
    done = loradock("serve", *arguments, **environ)
    assert done.returncode not in (0, None), done.stdout + done.stderr
    assert done.returncode > 0, "it was killed by a signal"
    assert "Traceback" not in done.stdout + done.stderr
    said = [line for line in done.stderr.splitlines() if line.strip()]
    assert said and said[-1].startswith("loradock: "), done.stderr
    assert len([line for line in said if line.startswith("loradock: ")]) == 1
    return said[-1]


def test_a_wrong_flag_names_the_nearest(tmp_path):
    assert "--max-lora-rank" in sentence("--max-lora-rnk", "8", "--data-dir", tmp_path)


def test_a_wrong_variable_names_the_nearest(tmp_path):
    assert "LORADOCK_MAX_LORAS" in sentence("--data-dir", tmp_path, LORADOCK_MAX_LORAZ="8")


def test_a_wrong_key_in_the_file_names_the_nearest(tmp_path):
    config = tmp_path / "loradock.yaml"
    config.write_text("grace_perod: 5\n")
    assert "grace_period" in sentence("--config", config, "--data-dir", tmp_path)


@pytest.mark.parametrize(
    "flag, value",
    [("--port", "http"), ("--port", "70000"), ("--grace-period", "-1"), ("--max-upload-bytes", "lots")],
)
def test_a_value_that_is_none_is_named(tmp_path, flag, value):
    said = sentence(flag, value, "--data-dir", tmp_path)
    assert flag.lstrip("-").replace("-", "_") in said.replace("-", "_")
    assert value.lstrip("-") in said


def test_a_missing_model_is_named(tmp_path):
    missing = tmp_path / "no-such-model"
    assert str(missing) in sentence(missing, "--data-dir", tmp_path)


def test_a_folder_that_holds_no_model_is_named(tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    assert str(folder) in sentence(folder, "--data-dir", tmp_path)


def test_an_adapter_is_not_taken_for_a_model(tmp_path):
    folder = tmp_path / "my-adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8}))
    said = sentence(folder, "--data-dir", tmp_path)
    assert "adapter" in said
    assert "push" in said


def test_a_port_in_use_is_named(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        said = sentence("--port", port, "--data-dir", tmp_path)
    assert port in said


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_a_public_address_is_refused_without_keys(tmp_path, host):
    said = sentence("--host", host, "--data-dir", tmp_path)
    assert host in said
    assert "LORADOCK_ADMIN_KEYS" in said


@pytest.mark.engine
def test_a_data_directory_that_cannot_be_made_is_named(tmp_path):
    file = tmp_path / "file"
    file.touch()
    assert "data" in sentence("--data-dir", file / "data", "--port", "0")


@pytest.mark.engine
def test_too_little_memory_is_told_before_anything_is_loaded(tmp_path):
    assert "memory" in sentence("--port", "0", "--data-dir", tmp_path, "--kv-cache-memory-bytes", "90000G")
