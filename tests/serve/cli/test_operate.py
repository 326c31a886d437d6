"""`loradock plan` and `restore` as scripts and people read them."""

from __future__ import annotations

import gzip
import json

import pytest
from typer.testing import CliRunner

from serve.cli.main import app
from serve.models.memory_plan import Plan

PLAN = Plan(
    weights=300 << 20, kv_token=1024, kv_cache=100 << 20, adapter=1 << 20, table=50 << 20, slots=8 << 20, host=32 << 20,
    overhead=700 << 20, free=4 << 30,
)  # fmt: skip


@pytest.fixture
def planned(monkeypatch):
    monkeypatch.setattr("serve.models.checkpoint.find", lambda model, cache, **_: model)
    monkeypatch.setattr("serve.models.memory_plan.plan", lambda *_, **__: PLAN)


def test_a_plan_is_json_in_bytes(planned):
    done = CliRunner().invoke(app, ["plan", "toy", "--json"])
    plan = json.loads(done.stdout)
    assert done.exit_code == 0 and plan["fits"] is True
    assert (plan["weights"], plan["total"], plan["tokens"]) == (PLAN.weights, PLAN.total, 102_400)
    assert plan["to_swap"] == PLAN.total + PLAN.weights + PLAN.kv_cache + PLAN.slots + PLAN.overhead
    assert "50 MiB more, mapped from its file" in CliRunner().invoke(app, ["plan", "toy"]).stdout


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 a zip", gzip.compress(b"x" * 10_000, mtime=0)[:40]])
def test_what_is_no_archive_is_a_sentence(tmp_path, content):
    file = tmp_path / "notes.txt"
    file.write_bytes(content)
    done = CliRunner().invoke(app, ["restore", str(file), "--data-dir", str(tmp_path / "data")])
    assert done.exit_code != 0
    message = str(done.exception)
    assert "notes.txt is no archive that `loradock backup` wrote" in message and "\n" not in message
    assert not (tmp_path / "data").exists()


def test_a_backup_of_the_default_folder_is_none_of_the_server_that_loradock_url_names(
    bare_environment, tmp_path, monkeypatch
):
    monkeypatch.setenv("LORADOCK_URL", "http://10.0.0.7:8000")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    for command in ("backup", "restore"):
        done = CliRunner().invoke(app, [command, str(tmp_path / "x.tar")])
        assert "http://10.0.0.7:8000" in str(done.exception) and "--data-dir DIR" in str(done.exception)
    assert not (tmp_path / "x.tar").exists()
    done = CliRunner().invoke(app, ["backup", str(tmp_path / "x.tar"), "--data-dir", str(tmp_path / "none")])
    assert "LORADOCK_URL" not in str(done.exception)


@pytest.mark.parametrize(
    ("adapters", "files", "text"),
    [(1, 1, "1 version of adapters, 1 file of"), (2, 0, "2 versions of adapters, 0 files")],
)
def test_one_is_not_said_as_many(tmp_path, monkeypatch, adapters, files, text):
    written = {"adapters": adapters, "files": files, "bytes": 0}
    monkeypatch.setattr("serve.adapters.registry.backup.backup", lambda *_: written)
    done = CliRunner().invoke(app, ["backup", str(tmp_path / "x.tar"), "--data-dir", str(tmp_path)])
    assert text in done.stdout


def test_a_file_that_is_not_there_is_a_sentence(tmp_path):
    done = CliRunner().invoke(app, ["restore", str(tmp_path / "gone.tar"), "--data-dir", str(tmp_path / "data")])
    assert "gone.tar cannot be read as a backup" in str(done.exception)
