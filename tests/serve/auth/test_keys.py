"""Keys that are issued: shown once, kept as hashes, gone when revoked."""

from __future__ import annotations

import json
from dataclasses import replace

import httpx
import pytest
from typer.testing import CliRunner

from serve.adapters.registry.registry import Registry
from serve.auth.keys import Keys
from serve.auth.rate_limits import Limits
from serve.cli.main import app as commands
from serve.config import keys_hashed
from serve.errors import BadRequest
from serve.server.assembly import build_app
from tests.support.app import ask, issued
from tests.support.backend import FakeBackend
from tests.support.disk import contents
from tests.support.listening import listening_beside


async def test_a_secret_is_shown_once_and_only_its_hash_is_kept(operator, config):
    told = (await operator.post("/v1/keys", json={"name": "ci", "tenant": "acme", "limits": {"concurrent": 2}})).json()
    secret = told.pop("secret")
    assert secret.startswith("ld_") and len(secret) > 40
    assert (told["tenant"], told["scopes"], told["limits"]["concurrent"]) == ("acme", ["inference"], 2)
    listed = await operator.get("/v1/keys")
    assert listed.json()["data"] == [told]
    assert (await operator.get("/v1/keys?tenant=globex")).json()["data"] == []
    kept = b"".join(contents(config.data_dir))
    assert secret.encode() not in kept and keys_hashed([secret])[0].encode() in kept


async def test_a_revoked_key_opens_nothing_at_once_and_for_good(operator, issue, connect, config):
    client = await issue("acme", "inference")
    assert (await ask(client, "base")).status_code == 200
    id = (await operator.get("/v1/keys")).json()["data"][0]["id"]
    first = (await operator.delete(f"/v1/keys/{id}")).json()
    assert first["revoked"]
    assert (await operator.delete(f"/v1/keys/{id}")).json() == first
    assert (await ask(client, "base")).status_code == 401
    assert (await operator.delete("/v1/keys/key_nobody")).status_code == 404


async def test_an_issued_admin_key_is_an_operator(issue):
    assert (await (await issue("default", "admin")).get("/v1/keys")).status_code == 200


async def test_a_key_for_metrics_reads_them_and_nothing_else(connect, config):
    config = replace(config, admin_keys=keys_hashed(["run"]), metrics_keys=keys_hashed(["scrape"]))
    async with connect(config) as operator:
        operator.headers["authorization"] = "Bearer run"
        made = await issued(operator, "default", "metrics")
        configured = httpx.AsyncClient(
            transport=operator._transport, base_url="http://localhost", headers={"authorization": "Bearer scrape"}
        )
        for client in (made, configured):
            assert "loradock_" in (await client.get("/metrics")).text
            assert (await client.get("/metrics/engine")).status_code == 200
            for path in ("/v1/models", "/v1/adapters", "/v1/engines", "/v1/keys", "/v1/drift"):
                assert (await client.get(path)).status_code == 403, path
            assert (await ask(client, "base")).status_code == 403
        asks = await issued(operator, "default", "inference", "adapters:write")
        assert (await asks.get("/metrics")).status_code == 403


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"name": ""}, "name"),
        ({"name": "a/b"}, "name"),
        ({"tenant": "a@b"}, "tenant"),
        ({"scopes": []}, "scopes"),
        ({"scopes": ["root"]}, "scopes"),
        ({"tenant": "acme", "scopes": ["admin"]}, "scopes"),
        ({"tenant": "acme", "scopes": ["inference", "metrics"]}, "scopes"),
        ({"limits": {"concurrent": 0}}, "limits.concurrent"),
        ({"limits": {"concurrent": "3"}}, "limits.concurrent"),
        ({"limits": {"concurent": 3}}, "limits.concurent"),
        ({"scope": ["inference"]}, "scope"),
    ],
)
async def test_a_key_that_cannot_be_is_refused_by_the_field_that_is_wrong(operator, body, param):
    refused = await operator.post("/v1/keys", json={"name": "x", **body})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
    assert (await operator.get("/v1/keys")).json()["data"] == []


async def test_a_server_that_is_open_issues_no_keys(client):
    refused = await client.post("/v1/keys", json={"name": "x"})
    assert refused.status_code == 409 and "LORADOCK_ADMIN_KEYS" in refused.json()["error"]["message"]


async def test_a_server_that_has_issued_keys_does_not_open_when_its_config_forgets_the_first(connect, config):
    async with connect(replace(config, admin_keys=keys_hashed(["run"]))) as client:
        run = {"authorization": "Bearer run"}
        made = (await client.post("/v1/keys", json={"name": "x"}, headers=run)).json()
        await client.delete(f"/v1/keys/{made['id']}", headers=run)
    async with connect(config, FakeBackend(config.model)) as client:
        assert (await ask(client, "base")).status_code == 401


def test_keys_survive_a_restart(tmp_path):
    url = f"sqlite:///{tmp_path}/registry.db"
    with Registry(url) as registry:
        keys = Keys(registry)
        key, _ = keys.create("acme", "ci", ["inference", "adapters:write"], Limits(tokens_per_minute=9))
        gone, _ = keys.create("acme", "old", ["inference"], Limits())
        gone = keys.revoke(gone.id)
    with Registry(url) as registry:
        again = Keys(registry)
        assert again.all() == (key, gone)
        assert again.caller(key.digest) == key.caller and again.caller(gone.digest) is None


def test_admin_stays_with_the_default_tenant():
    with Registry("sqlite://") as registry, pytest.raises(BadRequest, match="operators"):
        Keys(registry).create("acme", "x", ["admin"], Limits())


@pytest.fixture
def served(config):
    """The real server on a real socket, with the key `run`; its address."""
    app = build_app(replace(config, admin_keys=keys_hashed(["run"])), FakeBackend(config.model))
    with listening_beside(app) as url:
        yield url


def run(url: str, *words: str, key: str = "run"):
    return CliRunner().invoke(commands, ["keys", *words], env={"LORADOCK_URL": url, "LORADOCK_KEY": key})


def test_the_command_creates_lists_and_revokes(served):
    made = run(served, "create", "ci", "--tenant", "acme", "--scope", "inference", "--concurrent", "3", "--json")
    told = json.loads(made.stdout)
    assert made.exit_code == 0 and told["limits"]["concurrent"] == 3
    models = httpx.get(f"{served}/v1/models", headers={"authorization": f"Bearer {told['secret']}"}, timeout=60)
    assert models.status_code == 200
    listed = run(served, "list")
    assert told["id"] in listed.stdout and "concurrent=3" in listed.stdout and told["secret"] not in listed.stdout
    assert run(served, "revoke", told["id"]).exit_code == 0
    assert run(served, "list", key=told["secret"]).exit_code == 1
    plain = run(served, "create", "people")
    assert plain.exit_code == 0 and plain.stdout.splitlines()[-1].startswith("ld_")


def test_the_commands_exit_codes_are_those_of_the_others(served):
    refused = run(served, "create", "x", "--tenant", "acme", "--scope", "admin")
    assert refused.exit_code == 1 and refused.stderr.startswith("loradock keys: admin is for operators")
    assert run(served, "revoke", "key_nobody").exit_code == 1
    assert run(served, "create", "x", "--concurrent", "0").exit_code == 2
    assert run(served, "list", "--url", "ftp://x").exit_code == 2
