"""A data directory and a PostgreSQL registry that an earlier version made open in this one, with all that they hold."""

from __future__ import annotations

import json
import os
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from sqlalchemy import make_url

from serve.config import keys_hashed, load
from tests.support import postgres as postgresql
from tests.support import tiny
from tests.support.app import ask, upload
from tests.support.backend import FakeBackend
from tests.support.waiting import settled

MADE_BY_3143CCA = Path(__file__).parents[1] / "fixtures" / "data-3143cca.tar.xz"
ADMIN = "made-up-admin-key"
ANNA, GUS, REVOKED = (f"ld_made-up-secret-of-the-fixtures-{number}" for number in (1, 3, 5))


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    with tarfile.open(MADE_BY_3143CCA) as archive:
        archive.extractall(tmp_path / "kept", filter="data")
    # It was written to until just now: what is kept for some time goes on from there.
    for file in (tmp_path / "kept" / "data").rglob("*"):
        os.utime(file)
    return tmp_path / "kept"


@pytest.fixture(params=["sqlite", "postgresql"])
def opened(request, kept, connect):
    """`async with opened() as client` is an operator's client of a server over what was kept; what its API answered."""
    flags = [str(kept / "model"), "--name", "base", "--data-dir", str(kept / "data")]
    answers = kept / "answers.json"
    if request.param == "postgresql":
        url = postgresql.database(request.getfixturevalue("postgres"))
        restored(url, kept / "registry.sql")
        (kept / "data" / "registry.sqlite").unlink()
        flags += ["--registry", url]
        answers = kept / "answers-postgresql.json"
    config = replace(load(flags, {}), admin_keys=keys_hashed([ADMIN]), drift_reference=100, drift_threshold=1e4)
    return lambda: connect(config, FakeBackend(config.model)), json.loads(answers.read_text())


def restored(url: str, dump: Path) -> None:
    place = make_url(url)
    psql = [postgresql.programs() / "psql", "-q", "-U", place.username, "-h", place.query["host"], "-d", place.database]
    subprocess.run([*psql, "-v", "ON_ERROR_STOP=1", "-f", dump], check=True, stdout=subprocess.DEVNULL, timeout=60)


def of(client: httpx.AsyncClient, secret: str) -> httpx.AsyncClient:
    """The same server, with another key."""
    headers = {"authorization": f"Bearer {secret}"}
    return httpx.AsyncClient(transport=client._transport, base_url="http://localhost", headers=headers)


def lasting(adapter: dict) -> dict:
    """An adapter as the API describes it, but for what only a running server knows."""
    passing = ("resident", "recent", "checks")
    versions = [{key: value for key, value in version.items() if key not in passing} for version in adapter["versions"]]
    return {**adapter, "versions": versions}


def listed(models: dict) -> list:
    return [(card["id"], card["parent"], card["created"]) for card in models["data"]]


async def watched(client: httpx.AsyncClient, name: str) -> list[dict]:
    """What is known of its versions' drift, once one of them was asked and looked at."""

    async def versions():
        return (await client.get(f"/v1/adapters/{name}/drift")).json()["versions"]

    return await settled(versions)


def known(now, was):
    """`now` without the fields that `was` does not have, at any depth."""
    if isinstance(was, dict):
        return {key: known(now[key], value) for key, value in was.items()}
    if isinstance(was, list):
        return [known(*rows) for rows in zip(now, was, strict=True)]
    return now


def before_limits(key, old):
    """The key with the limits that there were then; those that came later are open."""
    later = key["limits"].keys() - old["limits"].keys()
    assert all(key["limits"][name] is None for name in later)
    return {**key, "limits": {name: value for name, value in key["limits"].items() if name not in later}}


async def test_versions_live_pointers_history_and_keys_are_all_there(opened):
    serve, before = opened
    async with serve() as client:
        client.headers["authorization"] = f"Bearer {ADMIN}"
        callers = {"operator": client, "anna": of(client, ANNA), "gus": of(client, GUS)}
        for asked, answer in before.items():
            who, path = asked.split()
            now = (await callers[who].get(path)).json()
            if path == "/v1/models":
                assert listed(now) == listed(answer)
            elif path == "/v1/keys":
                assert [
                    before_limits(key, old) for key, old in zip(now["data"], answer["data"], strict=True)
                ] == answer["data"]
            elif not path.endswith("/drift"):
                # What came later may be beside it.
                assert known(lasting(now), lasting(answer)) == lasting(answer), path
        assert before["operator /v1/adapters/tone"]["canary"] == {"version": 3, "weight": 0.5}
        assert (await of(client, REVOKED).get("/v1/models")).status_code == 401


async def test_baselines_and_the_canary_on_trial_go_on_where_they_were(opened, kept):
    serve, _ = opened
    # What is known of drift is in the data directory, whichever database the registry is in.
    before = json.loads((kept / "answers.json").read_text())
    async with serve() as client:
        client.headers["authorization"] = f"Bearer {ADMIN}"
        was = before["operator /v1/adapters/tone/drift"]
        canary = (await client.get("/v1/adapters/tone/drift")).json()["canary"]
        assert known(canary, was["canary"]) == was["canary"]
        for name in ("tone", "plain"):
            was = before[f"operator /v1/adapters/{name}/drift"]["versions"]
            assert (await ask(client, f"{name}@{was[0]['version']}")).status_code == 200
            now = await watched(client, name)
            assert now[0]["baseline"] == was[0]["baseline"]
            # Numbers of vectors were scores: evidence, and the largest shift of ranks, are of those that are left.
            for kind, signal in was[0]["signals"].items():
                kept = {
                    key: value for key, value in signal.items() if key not in ("log_evidence", "effects", "structure")
                }
                assert known(now[0]["signals"][kind], kept) == kept


async def test_a_push_and_a_rollback_work_afterwards(opened, tmp_path):
    serve, _ = opened
    async with serve() as client:
        client.headers["authorization"] = f"Bearer {ADMIN}"
        anna = of(client, ANNA)
        assert (await anna.post("/v1/adapters/voice/rollback")).json()["version"] == 1
        pushed = await anna.post("/v1/adapters", **upload(tiny.adapter(tmp_path / "new", seed=99), name="voice"))
        assert (pushed.status_code, pushed.json()["version"], pushed.json()["live"]) == (201, 3, True), pushed.text
        assert (await ask(of(client, GUS), "acme/voice")).json()["model"] == pushed.json()["id"]
        assert (await anna.post("/v1/adapters/voice/rollback")).json()["version"] == 1
        # What was deleted keeps its number.
        again = await client.post("/v1/adapters", **upload(tiny.adapter(tmp_path / "other", seed=98), name="short"))
        assert (again.status_code, again.json()["version"]) == (201, 2)


async def test_what_was_popular_is_loaded_first_and_the_audit_log_goes_on(opened, kept):
    serve, _ = opened
    lines = (kept / "data" / "audit.jsonl").read_text().splitlines()
    popular = json.loads((kept / "data" / "popular.json").read_text())
    async with serve() as client:
        client.headers["authorization"] = f"Bearer {ADMIN}"
        assert client._transport.app.state.parts.lifecycle.popularity.ranked(popular)[0] == max(
            popular, key=popular.get
        )
        assert (await client.post("/v1/adapters/tone/promote", json={"version": 2})).status_code == 200
    # With a new month the lines of the one before are in a file of their own.
    files = [*sorted((kept / "data").glob("audit-*.jsonl")), kept / "data" / "audit.jsonl"]
    after = [line for file in files for line in file.read_text().splitlines()]
    assert after[: len(lines)] == lines and json.loads(after[-1])["subject"] == "tone@v2"


async def test_an_adapter_of_then_gets_an_alias_and_tags(opened):
    serve, before = opened
    was = before["operator /v1/adapters/tone"]
    async with serve() as client:
        client.headers["authorization"] = f"Bearer {ADMIN}"
        tone = (await client.get("/v1/adapters/tone")).json()
        assert tone["aliases"] == {} and all(version["tags"] == [] for version in tone["versions"])
        assert all(row["label"] is None for row in tone["history"]) and len(tone["history"]) == len(was["history"])
        number = tone["versions"][0]["version"]
        assert (await client.put("/v1/adapters/tone/aliases/stable", json={"version": number})).is_success
        assert (await client.put(f"/v1/adapters/tone/versions/{number}/tags", json={"tags": ["old"]})).is_success
        assert (await ask(client, "tone@stable")).json()["model"] == tone["versions"][0]["id"]


async def test_an_adapter_of_then_gets_a_golden_set(opened):
    serve, _ = opened
    async with serve() as client:
        client.headers["authorization"] = f"Bearer {ADMIN}"
        golden = "/v1/adapters/tone/golden"
        assert (await client.get(golden)).status_code == 404
        kept = await client.put(golden, json={"cases": [{"prompt": "x", "equals": "y"}]})
        assert kept.status_code == 200 and kept.json()["count"] == 1, kept.text

        async def versions():
            return (await client.get(f"{golden}/results")).json()["versions"]

        assert (await settled(versions))[0]["errors"] == 1, "this engine says nothing"


async def test_a_batch_runs_over_a_data_directory_of_then(opened):
    serve, _ = opened
    async with serve() as client:
        client.headers["authorization"] = f"Bearer {ADMIN}"
        line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": "tone", "prompt": "x"}}
        form = {"data": {"purpose": "batch"}, "files": {"file": ("in.jsonl", json.dumps(line).encode())}}
        file = (await client.post("/v1/files", **form)).json()
        asked = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
        batch = (await client.post("/v1/batches", json=asked)).json()

        async def answers():
            return (await client.get(f"/v1/batches/{batch['id']}")).json()["output_file_id"]

        output = (await client.get(f"/v1/files/{await settled(answers)}/content")).json()
        assert output["response"]["body"]["model"].startswith("tone@")
