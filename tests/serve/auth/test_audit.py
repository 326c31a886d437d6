"""Who changed what, and what was refused: one line each."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys

import pytest

from serve.auth.audit import STRANGERS_PER_MINUTE, Audit
from tests.support.app import ask, upload


@pytest.fixture
def lines(config):
    return lambda: [json.loads(line) for line in (config.data_dir / "audit.jsonl").read_text().splitlines()]


async def test_every_change_is_a_line_with_who_what_and_how_it_ended(operator, issue, lines, make_adapter):
    acme = await issue("acme", name="anna")
    for seed in (0, 1):
        await acme.post("/v1/adapters", **upload(make_adapter(seed)))
    await acme.post("/v1/adapters/tone/promote", json={"version": 1}, headers={"x-request-id": "r-1"})
    await acme.post("/v1/adapters/tone/promote", json={"version": 9})
    await acme.post("/v1/adapters/tone/rollback")
    await acme.delete("/v1/adapters/tone/versions/1")
    await operator.delete("/v1/adapters/acme/tone")
    key = (await operator.get("/v1/keys")).json()["data"][0]["id"]
    await operator.delete(f"/v1/keys/{key}")
    told = [(row["who"], row["tenant"], row["what"], row["subject"], row["status"]) for row in lines()]
    admin = next(row["who"] for row in lines())
    assert told == [
        (admin, "default", "create_key", f"acme/anna {key}", 201),
        ("anna", "acme", "push", "acme/tone@v1", 201),
        ("anna", "acme", "push", "acme/tone@v2", 201),
        ("anna", "acme", "promote", "acme/tone@v1", 200),
        ("anna", "acme", "promote", "acme/tone@v9", 404),
        ("anna", "acme", "rollback", "acme/tone@v2", 200),
        ("anna", "acme", "remove_version", "acme/tone@v1", 200),
        (admin, "default", "remove", "acme/tone", 200),
        (admin, "default", "revoke_key", f"acme/anna {key}", 200),
    ]
    assert lines()[3]["request_id"] == "r-1" and lines()[1]["key"] == key
    assert {row["outcome"] for row in lines()} == {"done", "refused"}
    assert set(lines()[0]) == {
        "when", "who", "tenant", "key", "what", "subject", "outcome", "status", "request_id", "remote"
    }  # fmt: skip


async def test_refusals_are_told_and_neither_keys_nor_bodies(operator, issue, lines, config, make_adapter):
    asks = await issue("acme", "inference", name="anna")
    await asks.post("/v1/adapters", **upload(make_adapter()))
    stranger = {"authorization": "Bearer sk-of-somebody"}
    await operator.delete("/v1/adapters/tone", headers=stranger)
    await operator.post("/v1/keys", json={"name": "body-word", "bad": "x"})
    told = [(row["who"], row["what"], row["subject"], row["outcome"], row["status"]) for row in lines()[1:3]]
    assert told == [("anna", "push", "", "refused", 403), (None, "remove", "tone", "refused", 401)]
    text = (config.data_dir / "audit.jsonl").read_text()
    secrets = [asks.headers["authorization"].split()[1], "sk-of-somebody", "Bearer", "body-word", "lora_alpha"]
    assert not [secret for secret in secrets if secret in text]
    assert stat.S_IMODE((config.data_dir / "audit.jsonl").stat().st_mode) == 0o600


async def test_reads_and_inference_are_no_changes(operator, config):
    await operator.get("/v1/adapters")
    await ask(operator, "base")
    await operator.post("/v1/nothing")
    assert not (config.data_dir / "audit.jsonl").exists()


async def test_every_answer_to_a_change_says_its_request_id(operator, lines):
    told = await operator.delete("/v1/adapters/nobody", headers={"x-request-id": "no\tgood"})
    assert told.headers["x-request-id"] == lines()[-1]["request_id"] != "no\tgood"


async def test_a_log_that_cannot_be_written_stops_nobody_and_is_counted(operator, config, make_adapter):
    (config.data_dir / "audit.jsonl").mkdir()
    assert (await operator.post("/v1/adapters", **upload(make_adapter()))).status_code == 201
    assert "loradock_audit_failures_total 1.0" in (await operator.get("/metrics")).text


def test_strangers_cannot_fill_the_disk(tmp_path):
    now = [1_700_000_000.0]
    audit = Audit(tmp_path / "audit.jsonl", clock=lambda: now[0])
    for _ in range(1000):
        audit.write(status=401, who=None)
    assert len(audit.path.read_text().splitlines()) == STRANGERS_PER_MINUTE
    audit.write(status=200, who="anna")
    last = json.loads(audit.path.read_text().splitlines()[-1])
    assert (last["who"], last["omitted"]) == ("anna", 1000 - STRANGERS_PER_MINUTE)


class Clock:
    now = 1_796_000_000.0

    def __call__(self):
        return self.now


def rows_of(folder):
    files = [*sorted(folder.glob("audit-*.jsonl")), folder / "audit.jsonl"]
    return [json.loads(line) for file in files if file.exists() for line in file.read_text().splitlines()]


def refused(audit, number, key="k1", status=404, what="remove"):
    audit.write(status=status, who="anna", tenant="acme", key=key, what=what, subject=f"gone-{number}")


def test_refusals_of_one_key_that_repeat_become_one_line_with_their_number(tmp_path):
    clock = Clock()
    audit = Audit(tmp_path / "audit.jsonl", clock=clock)
    for number in range(300):
        refused(audit, number)
        clock.now += 0.006
    audit.write(status=200, who="anna", key="k1", what="remove", subject="there")
    refused(audit, 0, key="k2")
    refused(audit, 0, status=403)
    assert (tmp_path / "audit.jsonl").stat().st_size < 2500, "300 refusals were 154 kB"
    assert [row["subject"] for row in rows_of(tmp_path)] == [*(f"gone-{n}" for n in range(5)), "there", *["gone-0"] * 2]
    clock.now += 60
    audit.flush()
    last = rows_of(tmp_path)[-1]
    assert (last["subject"], last["repeated"], last["outcome"]) == ("gone-299", 295, "refused")
    assert last["since"] < last["when"]
    assert sum(row.get("repeated", 1) for row in rows_of(tmp_path)) == 303


def test_what_is_counted_is_written_when_the_server_stops(tmp_path):
    audit = Audit(tmp_path / "audit.jsonl", clock=Clock())
    for number in range(9):
        refused(audit, number)
    audit.flush(everything=True)
    assert rows_of(tmp_path)[-1]["repeated"] == 4


def test_a_large_file_is_rotated_and_no_line_is_lost(tmp_path):
    clock = Clock()
    audit = Audit(tmp_path / "audit.jsonl", max_bytes=2000, clock=clock)
    for number in range(100):
        audit.write(status=200, who="anna", key="k", what="push", subject=str(number))
    files = list(tmp_path.iterdir())
    assert len(files) > 3 and all(file.stat().st_size <= 2000 for file in files)
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert sorted(int(row["subject"]) for row in rows_of(tmp_path)) == list(range(100))


def test_many_processes_rotate_one_file_and_lose_no_line(tmp_path):
    script = (
        "import sys; from pathlib import Path; from serve.auth.audit import Audit\n"
        "audit = Audit(Path(sys.argv[1]) / 'audit.jsonl', max_bytes=3000)\n"
        "for number in range(200):\n"
        "    audit.write(status=200, who=sys.argv[2], key='k', what='push', subject=str(number))\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path), f"p{number}"]) for number in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    told = {(row["who"], row["subject"]) for row in rows_of(tmp_path)}
    assert len(rows_of(tmp_path)) == len(told) == 600


def test_a_month_has_a_file_of_its_own_and_old_files_go(tmp_path):
    clock = Clock()
    audit = Audit(tmp_path / "audit.jsonl", days=30, clock=clock)
    audit.write(status=200, who="anna", what="push")
    os.utime(tmp_path / "audit.jsonl", (clock.now, clock.now))
    clock.now += 31 * 86_400
    audit.write(status=200, who="anna", what="promote")
    assert [row["what"] for row in rows_of(tmp_path)] == ["push", "promote"]
    assert len(list(tmp_path.glob("audit-*.jsonl"))) == 1
    audit.flush()
    assert [row["what"] for row in rows_of(tmp_path)] == ["promote"]


def test_rotation_may_be_left_to_others(tmp_path):
    audit = Audit(tmp_path / "audit.jsonl", max_bytes=0, clock=Clock())
    for number in range(3):
        audit.write(status=200, who="anna", what="push", subject=str(number))
        (tmp_path / "audit.jsonl").rename(tmp_path / f"audit-{number}.jsonl")
    audit.flush()
    assert [row["subject"] for row in rows_of(tmp_path)] == ["0", "1", "2"]
