"""Who changed what, and what was refused: one line each."""

from __future__ import annotations

import json
import stat

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
