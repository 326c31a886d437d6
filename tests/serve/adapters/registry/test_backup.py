"""What a backup holds is what a restored server serves."""

from __future__ import annotations

import errno
import io
import json
import tarfile
from dataclasses import replace

import pytest
from sqlalchemy import insert

from serve.adapters.registry import tables
from serve.adapters.registry.backup import backup, restore
from serve.adapters.registry.registry import Registry
from serve.errors import ConfigError
from tests.support.app import ask, upload
from tests.support.backend import FakeBackend
from tests.support.waiting import settled


async def test_a_server_over_a_restored_backup_answers_as_the_one_that_was_backed_up(
    connect, config, make_adapter, tmp_path
):
    async with connect(config) as client:
        ids = [(await client.post("/v1/adapters", **upload(make_adapter(seed)))).json()["id"] for seed in (0, 1)]
        await client.post("/v1/adapters/tone/rollback")
        before = (await client.get("/v1/adapters/tone")).json()["history"]
        told = backup(config.data_dir, tmp_path / "backup.tar")  # while it runs
        await client.delete("/v1/adapters/tone")
    assert told["adapters"] == 2
    restore(tmp_path / "backup.tar", tmp_path / "restored")
    backend = FakeBackend(config.model)
    async with connect(replace(config, data_dir=tmp_path / "restored"), backend) as client:
        assert (await ask(client, "tone")).json() == {"model": ids[0]}
        assert (await ask(client, "tone@v2")).json() == {"model": ids[1]}
        assert (await client.get("/v1/adapters/tone")).json()["history"] == before
    assert (tmp_path / "restored" / "audit.jsonl").read_text()


@pytest.fixture
async def made(connect, config, make_adapter, tmp_path):
    """A backup with one adapter."""
    async with connect(config) as client:
        await client.post("/v1/adapters", **upload(make_adapter()))
    backup(config.data_dir, tmp_path / "backup.tar")
    return tmp_path / "backup.tar"


async def test_a_backup_whose_bytes_changed_is_refused_and_leaves_nothing(made, tmp_path):
    data = bytearray(made.read_bytes())
    at = data.index(b"adapter_model.safetensors") + 700
    data[at] ^= 1
    made.write_bytes(data)
    before = set(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="damaged"):
        restore(made, tmp_path / "restored")
    assert set(tmp_path.iterdir()) == before


async def test_half_a_backup_is_refused(made, tmp_path):
    made.write_bytes(made.read_bytes()[: made.stat().st_size // 2])
    with pytest.raises(ConfigError):
        restore(made, tmp_path / "restored")
    assert not (tmp_path / "restored").exists()


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "blobs/../../evil", "blobs/x/adapter_config.json"])
def test_a_member_under_another_name_is_refused(tmp_path, name):
    with tarfile.open(tmp_path / "backup.tar", "w") as tar:
        info = tarfile.TarInfo(name)
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
    with pytest.raises(ConfigError, match="no backup"):
        restore(tmp_path / "backup.tar", tmp_path / "restored")
    assert {path.name for path in tmp_path.iterdir()} == {"backup.tar"}


async def test_what_is_there_is_never_overwritten(made, config, tmp_path):
    with pytest.raises(ConfigError, match="not empty"):
        restore(made, config.data_dir)


def test_a_folder_that_is_no_data_directory_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no data directory"):
        backup(tmp_path, tmp_path / "backup.tar")
    with pytest.raises(ConfigError, match="pg_dump"):
        backup(tmp_path, tmp_path / "backup.tar", "postgresql://host/db")


async def test_files_of_batches_come_along_and_a_batch_under_way_ends_on_the_restored_server(connect, config, tmp_path):
    lines = [
        {"custom_id": str(n), "method": "POST", "url": "/v1/completions", "body": {"model": "base", "prompt": "x"}}
        for n in range(3)
    ]
    body = "\n".join(map(json.dumps, lines)).encode()
    async with connect(config) as client:
        sent = await client.post("/v1/files", data={"purpose": "batch"}, files={"file": ("in.jsonl", body)})
        new = {"input_file_id": sent.json()["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
        batch = (await client.post("/v1/batches", json=new)).json()["id"]
        told = backup(config.data_dir, tmp_path / "early.tar")
        assert await answered(client, batch)
        late = backup(config.data_dir, tmp_path / "late.tar")
    assert told["files"] >= 1 and late["files"] == 2
    for name in ("early", "late"):
        assert restore(tmp_path / f"{name}.tar", tmp_path / name)["files"] >= 1
        backend = FakeBackend(config.model)
        async with connect(replace(config, data_dir=tmp_path / name), backend) as client:
            content = (await client.get(f"/v1/files/{sent.json()['id']}/content")).content
            assert content == body
            done = await answered(client, batch)
            output = (await client.get(f"/v1/files/{done['output_file_id']}/content")).text
        assert sorted(json.loads(line)["custom_id"] for line in output.splitlines()) == ["0", "1", "2"]


async def answered(client, batch):
    async def completed():
        found = (await client.get(f"/v1/batches/{batch}")).json()
        return found["status"] == "completed" and found

    found = await settled(completed)
    assert found
    return found


def test_a_file_that_is_not_as_long_as_it_was_is_refused(tmp_path):
    with Registry(f"sqlite:///{tmp_path / 'registry.sqlite'}") as registry, registry.transaction() as connection:
        row = {"id": "file-1", "tenant": "default", "who": "me", "purpose": "batch", "filename": "x", "nbytes": 5}
        connection.execute(insert(tables.files).values(**row, created=0.0, expires=1.0))
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "file-1").write_bytes(b"abc")
    backup(tmp_path, tmp_path / "out" / "backup.tar")
    with pytest.raises(ConfigError, match="file-1 has 3 bytes"):
        restore(tmp_path / "out" / "backup.tar", tmp_path / "restored")


async def test_a_disk_that_is_full_is_said_and_keeps_nothing(connect, config, make_adapter, tmp_path, monkeypatch):
    async with connect(config) as client:
        await client.post("/v1/adapters", **upload(make_adapter()))
    out = tmp_path / "there"
    out.mkdir()

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("serve.adapters.registry.backup.fsync", full)
    with pytest.raises(ConfigError, match="backup.tar was not written: .*No space left on device"):
        backup(config.data_dir, out / "backup.tar")
    assert not list(out.iterdir())
