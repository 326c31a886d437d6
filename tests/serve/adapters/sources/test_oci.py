"""A push from a registry of images: the adapter that its digests name, from hosts that may be named, or nothing."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import current_thread

import httpx
import pytest

from serve.adapters.archive import zstd
from serve.adapters.sources import oci, transfer
from serve.adapters.sources.address import parse
from serve.adapters.sources.transfer import Body
from serve.config import keys_hashed
from serve.errors import BadRequest
from tests.support.oci_registry import ELSEWHERE, HOST, INDEX, TOKENS, OciRegistry, digest_of, running, tarred

SOURCE = f"oci://{HOST}/team/tone:v1"
UNPACK = {"io.deis.oras.content.unpack": "true"}


@pytest.fixture(autouse=True)
def logins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Nobody is logged in, unless a test says so: logins by the registry, or by one of its folders."""
    file = tmp_path / "logins.json"
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(file))
    return lambda **auths: file.write_text(json.dumps({"auths": {HOST: auths}}))


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[OciRegistry]:
    with running(OciRegistry()) as registry:
        monkeypatch.setattr(transfer, "http_client", registry.client)
        yield registry


@pytest.fixture
def hosted(config):
    return replace(config, source_hosts=(HOST, TOKENS))


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def pushed(registry: OciRegistry, folder: Path, tag: str = "v1", prefix: str = "") -> str:
    """As `oras push` does with files."""
    layers = [registry.layer(data, f"{prefix}{name}") for name, data in content(folder).items()]
    return registry.push("team/tone", tag, *layers)


async def push(client, source=SOURCE, **more):
    return await client.post("/v1/adapters", json={"name": "tone", "source": source, **more})


async def test_files_of_an_artifact_become_a_version_that_knows_the_manifest_s_digest(
    connect, hosted, registry, make_adapter
):
    (make_adapter() / "README.md").write_text("---\nauthor: team tone\n---\n")
    digest = pushed(registry, make_adapter())
    pushed(registry, make_adapter(1), "latest", "adapter/")
    async with connect(hosted) as client:
        done = await push(client)
        assert (done.status_code, done.json()["live"]) == (201, True), done.text
        assert done.json()["provenance"] == {
            "trained_by": "team tone", "source": SOURCE, "source_version": digest
        }  # fmt: skip
        history = (await client.get("/v1/adapters/tone")).json()["history"]
        assert history[0]["why"] == f"from {SOURCE} ({digest})"
        assert (await push(client, f"oci://{HOST}/team/tone@{digest}")).json()["version"] == 1
        assert (await push(client, f"oci://{HOST}/team/tone")).json()["version"] == 2
    assert {host for host, _ in registry.asked} == {HOST, TOKENS}
    assert {host for host, _ in registry.authorized} == {HOST}


@pytest.mark.parametrize("pack", [partial(tarred, mode="w"), tarred, lambda files: zstd.compress(tarred(files, "w"))])
async def test_a_folder_comes_as_one_archive_that_waits_for_its_turn(
    connect, hosted, registry, make_adapter, pack, monkeypatch
):
    threads, unpack = [], oci.unpack
    monkeypatch.setattr(
        oci, "unpack", lambda *args, **named: (threads.append(current_thread().name), unpack(*args, **named))
    )
    files = {f"adapter/{name}": data for name, data in content(make_adapter()).items()}
    kind = "application/vnd.oci.image.layer.v1.tar"
    registry.push("team/tone", "v1", registry.layer(pack(files), "adapter", kind, **UNPACK))
    async with connect(hosted) as client:
        assert (await push(client)).status_code == 201
    assert [name.rpartition("_")[0] for name in threads] == ["adapter-files"]


@pytest.mark.parametrize("order", [1, -1], ids=["the adapter last", "the adapter first"])
async def test_of_an_image_the_last_layer_with_an_adapter_counts(connect, hosted, registry, make_adapter, order):
    """As a model in an image: built on another one, the files in a folder."""
    kind = "application/vnd.oci.image.layer.v1.tar+gzip"
    files = {f"models/{name}": data for name, data in content(make_adapter()).items()}
    old = {f"models/{name}": data for name, data in content(make_adapter(1)).items()}
    adapter = registry.layer(tarred(files), kind=kind)
    others = [
        registry.layer(tarred(old), kind=kind),
        registry.layer(tarred({"README.md": b"", "etc/x": b""}), kind=kind),
    ]
    registry.push("team/tone", "v1", *[others[0], *[others[1], adapter][::order]])
    registry.push("team/tone", "first", registry.layer(b"no archive", kind=kind), adapter)
    async with connect(hosted) as client:
        digests = [(await push(client, f"oci://{HOST}/team/tone:{tag}")).json()["digest"] for tag in ("v1", "first")]
        files = {name: (make_adapter() / name).open("rb") for name in content(make_adapter())}
        by_hand = await client.post(
            "/v1/adapters", data={"name": "tone"}, files=[("files", pair) for pair in files.items()]
        )
    assert digests == [by_hand.json()["digest"]] * 2


async def test_an_index_of_one_manifest_is_followed_and_one_of_several_is_not(connect, hosted, registry, make_adapter):
    digest = pushed(registry, make_adapter(), "inner")
    about = {"digest": digest_of(b"x"), "annotations": {"vnd.docker.reference.type": "attestation-manifest"}}
    registry.put("team/tone", "v1", INDEX, {"manifests": [{"digest": digest, "size": 1}, about]})
    registry.put("team/tone", "two", INDEX, {"manifests": [{"digest": digest, "size": 1}] * 2})
    async with connect(hosted) as client:
        assert (await push(client)).status_code == 201
        several = await push(client, f"oci://{HOST}/team/tone:two")
    assert several.status_code == 422 and "by its digest" in several.text


async def test_a_layer_that_is_not_what_its_digest_says_is_refused_and_leaves_nothing(
    connect, hosted, registry, make_adapter
):
    pushed(registry, make_adapter())
    weights = (make_adapter() / "adapter_model.safetensors").read_bytes()
    async with connect(hosted) as client:
        for wrong in (bytes([weights[0] ^ 1]) + weights[1:], weights[:-1], weights + b"\0"):
            registry.blobs[digest_of(weights)] = wrong
            refused = await push(client)
            assert refused.status_code in (400, 422), refused.text
        assert (await client.get("/v1/adapters/tone")).status_code == 404
        digest = digest_of(b"else")
        registry.manifests["team/tone", digest] = registry.manifests["team/tone", "v1"]
        assert "damaged" in (await push(client, f"oci://{HOST}/team/tone@{digest}")).text
    assert not list((hosted.data_dir / "quarantine").iterdir())


def test_a_body_gets_so_many_seconds_however_slowly_it_comes(monkeypatch):
    def drops():
        for _ in range(300):
            time.sleep(0.01)
            yield b"x"

    monkeypatch.setattr(transfer, "SECONDS", 0.1)
    with pytest.raises(BadRequest, match="took longer"):
        Body(httpx.Response(200, content=drops())).read(1 << 20)
    monkeypatch.setattr(transfer, "SECONDS", 60)
    body = Body(httpx.Response(200, content=iter([b"ab", b"cde", b"f"])))
    assert [body.read(4), body.read(4), body.read(4)] == [b"abcd", b"ef", b""]


async def test_a_layer_elsewhere_is_read_without_the_token_and_only_where_its_host_may_be_named(
    connect, hosted, registry, make_adapter
):
    pushed(registry, make_adapter())
    async with connect(hosted) as client:
        for place in (f"https://{ELSEWHERE}", "https://169.254.169.254", f"http://{HOST}", "file:///etc", "//x/y"):
            registry.moved = place
            refused = await push(client)
            assert refused.status_code == 400 and "source_hosts" in refused.text, refused.text
    assert {host for host, _ in registry.asked} == {HOST, TOKENS}
    registry.moved = f"https://{ELSEWHERE}"
    async with connect(replace(hosted, source_hosts=(HOST, TOKENS, ELSEWHERE))) as client:
        assert (await push(client)).status_code == 201
    assert ELSEWHERE not in {host for host, _ in registry.authorized}


async def test_a_service_for_tokens_on_another_host_is_not_asked(connect, hosted, registry, make_adapter):
    pushed(registry, make_adapter())
    async with connect(hosted) as client:
        for realm in ("https://10.0.0.1/token", f"http://{TOKENS}/token", "https://auth.example.org.evil/token"):
            registry.realm = realm
            assert (await push(client)).status_code == 400
        registry.challenge = "Basic"
        login = await push(client)
    assert login.status_code == 403 and "wants a login" in login.text
    assert {host for host, _ in registry.asked} == {HOST}


LOGINS = {
    "a password": {"auth": base64.b64encode(b"ada:secret").decode()},
    "a password in the clear": {"username": "ada", "password": "secret"},
    "an identity token": {"auth": base64.b64encode(b"ada:").decode(), "identitytoken": "for-others"},
    "a token for the registry": {"registrytoken": "given"},
}


@pytest.mark.parametrize("login", LOGINS)
async def test_a_private_artifact_comes_with_the_login_that_is_there(
    connect, hosted, registry, make_adapter, logins, login
):
    registry.users, registry.identities, registry.tokens = {"ada": "secret"}, {"for-others"}, {"given"}
    pushed(registry, make_adapter())
    async with connect(hosted) as client:
        stranger = await push(client)
        assert stranger.status_code == 403, stranger.text
        logins(**LOGINS[login])
        assert (await push(client)).status_code == 201
    assert {host for host, _ in registry.authorized} <= {HOST, TOKENS}


async def test_a_login_is_shown_to_no_other_host(connect, hosted, registry, make_adapter, logins):
    registry.users = {"ada": "secret"}
    logins(**LOGINS["a password"])
    pushed(registry, make_adapter())
    async with connect(hosted) as client:
        registry.realm = f"https://{ELSEWHERE}/token"
        assert (await push(client)).status_code == 400
    registry.realm, registry.moved = f"https://{TOKENS}/token", f"https://{ELSEWHERE}"
    async with connect(replace(hosted, source_hosts=(HOST, TOKENS, ELSEWHERE))) as client:
        assert (await push(client)).status_code == 201
    assert (ELSEWHERE, "/token") not in registry.asked and {host for host, _ in registry.authorized} == {HOST, TOKENS}


async def test_a_registry_without_tokens_is_shown_the_login_itself(connect, hosted, registry, make_adapter, logins):
    registry.users, registry.challenge = {"ada": "secret"}, "Basic"
    pushed(registry, make_adapter())
    async with connect(hosted) as client:
        assert "wants a login" in (await push(client)).text
        logins(username="ada", password="another")
        assert (await push(client)).status_code == 403
        logins(**LOGINS["a password"])
        assert (await push(client)).status_code == 201
    assert TOKENS not in {host for host, _ in registry.asked}


async def test_a_login_that_is_not_taken_or_cannot_be_read_is_a_sentence(
    connect, hosted, registry, make_adapter, logins, tmp_path
):
    registry.users = {"ada": "secret"}
    pushed(registry, make_adapter())
    async with connect(hosted) as client:
        logins(username="ada", password="another")
        refused = await push(client)
        assert refused.status_code == 403 and f"login of this server for {HOST} is not taken" in refused.text
        (tmp_path / "logins.json").write_text("{")
        broken = await push(client)
        assert broken.status_code == 400 and "logins.json with the logins to registries is no JSON" in broken.text
        assert (await client.get("/v1/adapters/tone")).status_code == 404


async def test_a_token_that_is_over_between_two_layers_is_asked_for_again(connect, hosted, registry, make_adapter):
    pushed(registry, make_adapter())
    registry.once, registry.realm = True, f"{registry.realm}?by=registry"
    async with connect(hosted) as client:
        assert (await push(client)).status_code == 201
    assert [path for host, path in registry.asked if host == TOKENS].count("/token") >= 3


async def test_the_size_limit_holds_before_and_while_layers_come(connect, hosted, registry, make_adapter):
    pushed(registry, make_adapter())
    async with connect(replace(hosted, max_upload_bytes=500)) as client:
        assert (await push(client)).status_code == 413
    assert not [
        path for _, path in registry.asked if digest_of(content(make_adapter())["adapter_model.safetensors"]) in path
    ]
    weights = content(make_adapter())["adapter_model.safetensors"]
    bomb = tarred({**content(make_adapter()), "adapter_model.safetensors": weights + bytes(1 << 20)})
    registry.push("team/tone", "v1", registry.layer(bomb, "adapter", "application/vnd.oci.image.layer.v1.tar+gzip"))
    async with connect(replace(hosted, max_upload_bytes=100_000)) as client:
        assert (await push(client)).status_code == 413
    assert not list((hosted.data_dir / "quarantine").iterdir())


async def test_what_is_no_adapter_is_a_sentence(connect, hosted, registry):
    some = registry.layer(b"some bytes", "notes.txt")
    tar = registry.layer(tarred({"x": b""}), "a", "application/vnd.oci.image.layer.v1.tar+gzip")
    for layers in ([], [some], [tar], [tar, tar], [registry.layer(b"x", "adapter_model.bin")]):
        registry.push("team/tone", "v1", *layers)
        async with connect(hosted) as client:
            refused = await push(client)
            assert refused.status_code == 422, refused.text
    for document in (
        {},
        {"layers": 3},
        {"layers": [3]},
        {"layers": [{"digest": "md5:1", "size": 1}]},
        {"manifests": 1},
    ):
        registry.put("team/tone", "v1", "x", document)
        async with connect(hosted) as client:
            assert (await push(client)).status_code == 422, document
            assert (await push(client, f"oci://{HOST}/team/none")).status_code == 422


async def test_a_host_that_may_not_be_named_is_not_asked_nor_by_another_tenant(connect, hosted, registry):
    async with connect(replace(hosted, admin_keys=keys_hashed(["run"]))) as client:
        client.headers["authorization"] = "Bearer run"
        assert (await push(client, "oci://other.example.org/team/tone:v1")).status_code == 400
        body = {"tenant": "acme", "name": "key", "scopes": ["adapters:write"]}
        secret = (await client.post("/v1/keys", json=body)).json()["secret"]
        client.headers["authorization"] = f"Bearer {secret}"
        assert (await push(client)).status_code == 400
    assert registry.asked == []


@pytest.mark.parametrize(
    "source",
    [
        "oci://h", "oci://h/", "oci://h/Team/x", "oci://h/a:b:c", "oci://h/a@sha256:12", "oci://h/../a", "oci://u@h/a",
        "oci://h/a?x=1", "oci://h//a", "mlflow://models/x", "mlflow://runs/1/x", "mlflow://models/x/1/../y",
        "mlflow://elsewhere/x/1", "wandb-artifact://a/b", "wandb-artifact://a/b/c", "wandb-artifact://a/../c:v1",
    ],
)  # fmt: skip
def test_any_other_address_is_refused(source):
    with pytest.raises(BadRequest):
        parse(source, [Path("/")], ["h"])
