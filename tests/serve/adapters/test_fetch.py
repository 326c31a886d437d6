"""A push that names a place: two files come from it, and nothing else from anywhere."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import fsspec
import httpx
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.torch import load_file, save

from serve.adapters.adapter import NOTES
from serve.adapters.sources import transfer
from serve.adapters.sources.address import Source, address_of, parse
from serve.adapters.sources.kind import offered
from serve.adapters.untrusted import open_plain
from serve.config import keys_hashed
from serve.errors import AdapterRejected, BadRequest, Forbidden
from tests.support import package


class Bucket(MemoryFileSystem):
    """Object storage at the edge; remembers what was opened."""

    protocol = ("s3",)
    opened: list[str] = []  # noqa: RUF012
    cachable = False

    def open(self, path, mode="rb", **options):
        if mode == "rb":
            self.opened.append(path)
        return super().open(path, mode, **options)


@pytest.fixture
def bucket(monkeypatch):
    from fsspec.registry import _registry

    monkeypatch.setitem(_registry, "s3", Bucket)
    Bucket.opened.clear()
    yield Bucket()
    Bucket.store.clear()


@pytest.fixture
def rooted(config, tmp_path):
    return replace(config, source_roots=(str(tmp_path),))


def put(bucket, folder, prefix):
    for file in Path(folder).iterdir():
        bucket.pipe_file(f"{prefix}/{file.name}", file.read_bytes())


async def push(client, source, **more):
    return await client.post("/v1/adapters", json={"name": "tone", "source": source, **more})


async def test_a_folder_below_a_root_is_fetched_and_judged_like_any_upload(connect, rooted, make_adapter):
    async with connect(rooted) as client:
        done = await push(client, f"file://{make_adapter()}")
        assert (done.status_code, done.json()["live"]) == (201, True)
        assert (await push(client, f"file://{make_adapter()}")).status_code == 200
        refused = await push(client, f"file://{make_adapter(rank=32)}")
        assert refused.status_code == 422 and "rank" in refused.json()["error"]["message"]
        history = (await client.get("/v1/adapters/tone")).json()["history"]
        assert history[0]["why"] == f"from file://{make_adapter()}"
    assert not list((rooted.data_dir / "quarantine").iterdir())


async def test_a_folder_outside_every_root_is_forbidden_also_through_a_link(connect, config, make_adapter, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(make_adapter())
    async with connect(replace(config, source_roots=(str(root),))) as client:
        for folder in (make_adapter(), root / "link", f"{root}x", "/"):
            assert (await push(client, f"file://{folder}")).status_code == 403
        assert (await push(client, f"file://{root}/../adapter-0-2")).status_code == 400
    async with connect(config) as client:
        assert (await push(client, f"file://{make_adapter()}")).status_code == 403


async def test_a_link_in_the_folder_and_a_pipe_are_not_followed(connect, rooted, make_adapter, tmp_path):
    folder, secret = make_adapter(), tmp_path / "secret"
    secret.write_text("{}")
    for put_there in (lambda path: path.symlink_to(secret), os.mkfifo):
        (folder / "adapter_config.json").unlink()
        put_there(folder / "adapter_config.json")
        async with connect(rooted) as client:
            assert (await push(client, f"file://{folder}")).status_code == 422


async def test_two_files_and_their_notes_come_from_object_storage(client, bucket, make_adapter):
    put(bucket, make_adapter(), "models/team/tone")
    bucket.pipe_file("models/team/tone/README.md", b"---\nlicense: mit\n---")
    assert (await push(client, "s3://models/team/tone")).status_code == 201
    files = {"adapter_config.json", "adapter_model.safetensors", *NOTES}
    assert {Path(path).name for path in bucket.opened} <= files


async def test_weights_in_several_files_come_by_their_index(client, bucket, make_adapter):
    tensors = load_file(make_adapter() / "adapter_model.safetensors")
    index: dict[str, str] = {}
    for number, half in enumerate((list(tensors)[::2], list(tensors)[1::2]), 1):
        file = f"adapter_model-{number:05}-of-00002.safetensors"
        bucket.pipe_file(f"models/tone/{file}", save({name: tensors[name] for name in half}))
        index |= dict.fromkeys(half, file)
    bucket.pipe_file("models/tone/adapter_config.json", (make_adapter() / "adapter_config.json").read_bytes())
    assert (await push(client, "s3://models/tone")).status_code == 422
    bucket.pipe_file("models/tone/adapter_model.safetensors.index.json", json.dumps({"weight_map": index}).encode())
    done = await push(client, "s3://models/tone")
    assert done.status_code == 201, done.text
    for odd in (b"{", b'{"weight_map": {"a": "/etc/passwd"}}', b'{"weight_map": {}}'):
        bucket.pipe_file("models/tone/adapter_model.safetensors.index.json", odd)
        assert (await push(client, "s3://models/tone")).status_code == 422


async def test_the_card_is_fetched_where_licenses_are_checked(connect, config, bucket, make_adapter):
    put(bucket, make_adapter(), "models/tone")
    async with connect(replace(config, allowed_licenses=("mit",))) as client:
        assert (await push(client, "s3://models/tone")).status_code == 422
        bucket.pipe_file("models/tone/README.md", b"---\nlicense: mit\n---")
        done = await push(client, "s3://models/tone")
    assert (done.status_code, done.json()["checks"]["license"]) == (201, "mit")


async def test_the_size_limit_holds_while_bytes_arrive(connect, config, bucket, make_adapter):
    put(bucket, make_adapter(), "models/tone")
    bucket.pipe_file("models/tone/adapter_model.safetensors", b"\0" * (1 << 20))
    async with connect(replace(config, max_upload_bytes=100_000)) as client:
        assert (await push(client, "s3://models/tone")).status_code == 413
    assert not list((config.data_dir / "quarantine").iterdir())


async def test_a_place_without_an_adapter_or_without_an_answer_is_a_sentence(client, bucket, monkeypatch):
    empty = await push(client, "s3://models/nothing")
    assert empty.status_code == 422 and "s3://models/nothing has no" in empty.json()["error"]["message"]

    def fail(*_, **__):
        raise RuntimeError("the endpoint is gone")

    monkeypatch.setattr(Bucket, "open", fail)
    gone = await push(client, "s3://models/nothing")
    assert gone.status_code == 400 and "the endpoint is gone" in gone.json()["error"]["message"]


async def test_a_scheme_whose_package_is_missing_says_which(client, monkeypatch):
    def absent(*_, **__):
        raise ImportError("no s3fs")

    monkeypatch.setattr(fsspec, "filesystem", absent)
    answer = await push(client, "s3://models/tone")
    assert answer.status_code == 400 and "s3fs is not installed" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "source",
    [
        "", "tone", "http://169.254.169.254/latest", "https://x/y", "ftp://x/y", "memory://x", "FILE:///x", "s3:/x/y",
        "s3://", "s3://b/../x", "s3://bucket/x?versionId=1", "s3://user:pw@bucket/x", "s3://bucket::file:///etc",
        "file://host/x", "file://relative", "file:///a/../b", "hf://team", "hf://datasets/team/tone", "hf://a/b/../c",
        "hf://a/..", "hf://a/b@../../x", "hf://a/b::file:///etc/passwd", "simplecache::s3://bucket/x", "s3://b\nx/y",
    ],
)  # fmt: skip
def test_any_other_address_is_refused_before_anything_is_opened(source):
    with pytest.raises(BadRequest):
        parse(source, [Path("/")])


def test_an_address_becomes_a_place(tmp_path):
    assert parse("s3://bucket/a/b/") == Source("s3", "bucket/a/b")
    assert parse("hf://team/tone@main/best") == Source("hf", "team/tone@main/best")
    assert parse(f"file://{tmp_path}/x/", [tmp_path]) == Source("file", str(Path(os.path.realpath(tmp_path)) / "x"))
    with pytest.raises(Forbidden):
        parse("file:///etc", [tmp_path])


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"name": "tone"}', b'{"name": "tone", "source": 3}'])
async def test_a_body_that_asks_for_nothing_is_a_sentence(client, body):
    answer = await client.post("/v1/adapters", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["message"]


async def test_a_giant_body_and_a_bad_name_are_refused_before_anything_is_fetched(client, bucket):
    assert (await push(client, "s3://models/" + "x" * 2_000_000)).status_code == 413
    assert (await client.post("/v1/adapters", json={"name": "../x", "source": "s3://models/x"})).status_code == 400
    assert bucket.opened == []


# Whose the server's own means are


@pytest.fixture
def filled(bucket, make_adapter):
    put(bucket, make_adapter(), "models/tone")


async def test_a_push_by_address_goes_into_the_callers_tenant_and_counts_for_its_quota(issue, filled, config):
    acme = await issue("acme", adapters=1)
    done = await push(acme, "s3://models/tone", visibility="shared")
    assert (done.status_code, done.json()["tenant"], done.json()["visibility"]) == (201, "acme", "shared")
    assert done.json()["id"].startswith("acme/tone@")
    over = await acme.post("/v1/adapters", json={"name": "more", "source": "s3://models/tone"})
    assert over.status_code == 429 and "1 adapters" in over.json()["error"]["message"]
    assert (await push(acme, "s3://models/tone", visibility="public")).status_code == 400
    for name in ("globex/tone", "default/tone"):
        assert (await acme.post("/v1/adapters", json={"name": name, "source": "s3://models/tone"})).status_code == 400
    lines = [json.loads(line) for line in (config.data_dir / "audit.jsonl").read_text().splitlines()]
    assert [(row["subject"], row["status"]) for row in lines if row["what"] == "push"][:2] == [
        ("acme/tone@v1", 201),
        ("more", 429),
    ]


async def test_the_servers_credentials_are_not_lent_to_other_tenants(operator, issue, filled, monkeypatch):
    used, really = [], fsspec.filesystem

    def filesystem(name, **options):
        used.append(options)
        return really(name, **options)

    monkeypatch.setattr(fsspec, "filesystem", filesystem)
    for client in (operator, await issue("default"), await issue("acme")):
        assert (await push(client, "s3://models/tone")).is_success
    assert [options.get("anon") for options in used] == [None, None, True]


async def test_the_servers_folders_are_not_shown_to_other_tenants(connect, rooted, make_adapter, tmp_path):
    guarded = replace(rooted, admin_keys=keys_hashed(["run"]))
    async with connect(guarded) as client:
        client.headers["authorization"] = "Bearer run"
        assert (await push(client, f"file://{make_adapter()}")).status_code == 201
        body = {"tenant": "acme", "name": "key", "scopes": ["adapters:write"]}
        secret = (await client.post("/v1/keys", json=body)).json()["secret"]
        client.headers["authorization"] = f"Bearer {secret}"
        there, absent = [await push(client, f"file://{tmp_path}/{name}") for name in (make_adapter().name, "absent")]
        assert there.status_code == absent.status_code == 403


async def test_a_real_s3_service_is_read_with_the_server_s_own_credentials(client, s3, make_adapter):
    for file in make_adapter().iterdir():
        s3.upload_file(str(file), "models", f"team/tone/{file.name}")
    done = await push(client, "s3://models/team/tone")
    assert (done.status_code, done.json()["live"]) == (201, True), done.text
    again = await push(client, "s3://models/team/tone")
    assert (again.status_code, again.json()["digest"]) == (200, done.json()["digest"])


async def test_a_real_s3_service_without_the_adapter_is_a_sentence(client, s3):
    missing = await push(client, "s3://models/nothing/here")
    assert missing.status_code == 422 and "adapter_config.json" in missing.json()["error"]["message"]
    nowhere = await push(client, "s3://no-such-bucket/tone")
    assert 400 <= nowhere.status_code < 500 and "Traceback" not in nowhere.text


# https, from hosts that are named


@pytest.fixture
def web(monkeypatch, make_adapter):
    """A web server at the edge; what it was asked, and what it answers beside an adapter at /models/tone."""
    asked, answers = [], {}
    for file in make_adapter().iterdir():
        answers[f"/models/tone/{file.name}"] = (200, file.read_bytes(), {})

    def answer(request):
        asked.append(request)
        status, data, headers = answers.get(request.url.path, (404, b"", {}))
        return httpx.Response(status, headers=headers, stream=httpx.ByteStream(data))

    def client():
        return httpx.Client(transport=httpx.MockTransport(answer), follow_redirects=really().follow_redirects)

    really = transfer.http_client
    monkeypatch.setattr(transfer, "http_client", client)
    return SimpleNamespace(asked=asked, answers=answers)


async def test_two_files_come_from_a_host_that_may_be_named(connect, config, web):
    async with connect(replace(config, source_hosts=("models.example.org", "other:8443"))) as client:
        done = await push(client, "https://models.example.org/models/tone/")
        assert (done.status_code, done.json()["live"]) == (201, True), done.text
        assert (await push(client, "https://other:8443/models/tone")).status_code == 200
    assert [request.url.host for request in web.asked] == ["models.example.org"] * 6 + ["other"] * 6
    assert not any("authorization" in request.headers for request in web.asked)


async def test_no_other_host_is_asked(connect, config, web):
    async with connect(replace(config, source_hosts=("models.example.org",))) as client:
        for place in (
            "example.org/models/tone", "models.example.org:8443/models/tone", "models.example.org.evil/models/tone",
            "me@models.example.org/models/tone", "models.example.org/models/../tone", "models.example.org",
            "models.example.org/tone?x=1", "models.example.org/tone#x", "MODELS.example.org/models/tone",
            "models.example.org/%2e%2e/tone", "169.254.169.254/latest",
        ):  # fmt: skip
            refused = await push(client, f"https://{place}")
            assert refused.status_code == 400 and refused.json()["error"]["param"] == "source", place
    assert web.asked == []


async def test_a_redirect_is_not_followed_and_a_refusal_is_a_sentence(connect, config, web):
    place = "https://models.example.org/models/moved"
    answers = {302: 400, 307: 400, 401: 403, 403: 403, 404: 422, 410: 422, 500: 400, 206: 400}
    async with connect(replace(config, source_hosts=("models.example.org",))) as client:
        for status, expected in answers.items():
            headers = {"location": "http://169.254.169.254/latest/adapter_config.json"}
            web.answers["/models/moved/adapter_config.json"] = (status, b"{}", headers)
            refused = await push(client, place)
            assert refused.status_code == expected and "models.example.org" in refused.text, status
    assert {request.url.host for request in web.asked} == {"models.example.org"}


async def test_the_size_limit_holds_for_a_web_server_too(connect, config, web):
    web.answers["/models/tone/adapter_model.safetensors"] = (200, b"\0" * (1 << 20), {})
    async with connect(replace(config, source_hosts=("h",), max_upload_bytes=100_000)) as client:
        assert (await push(client, "https://h/models/tone")).status_code == 413


async def test_the_servers_neighbours_are_not_shown_to_other_tenants(connect, config, web):
    guarded = replace(config, source_hosts=("h",), admin_keys=keys_hashed(["run"]))
    async with connect(guarded) as client:
        client.headers["authorization"] = "Bearer run"
        body = {"tenant": "acme", "name": "key", "scopes": ["adapters:write"]}
        secret = (await client.post("/v1/keys", json=body)).json()["secret"]
        client.headers["authorization"] = f"Bearer {secret}"
        assert (await push(client, "https://h/models/tone")).status_code == 400
    assert web.asked == []


# Paths, as vLLM's runtime LoRA API has them


def test_a_path_becomes_an_address():
    assert address_of("/models/tone") == "file:///models/tone"
    assert address_of("team/tone") == "hf://team/tone"
    assert address_of("s3://bucket/tone") == "s3://bucket/tone"
    for odd in ("", "tone", "./tone", "~/tone", "a/b/c", "../tone", "a/../b"):
        with pytest.raises(BadRequest):
            address_of(odd)


def test_a_folder_that_became_a_link_after_it_was_judged_is_not_opened(make_adapter, tmp_path):
    judged = Path(os.path.realpath(make_adapter()))
    with open_plain(judged / "adapter_config.json", real=True) as file:
        assert file.read(1) == b"{"
    judged.rename(tmp_path / "elsewhere")
    judged.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AdapterRejected):
        open_plain(judged / "adapter_config.json", real=True)
    with pytest.raises(AdapterRejected):
        open_plain(judged / "absent" / "adapter_config.json", real=True)


async def test_a_source_of_another_package_is_fetched_for_tenant_default(
    connect, config, make_adapter, tmp_path, monkeypatch
):
    """One file and one line, as docs/contributing.md shows them."""
    offered.cache_clear()
    package.installed(tmp_path, "shelf", monkeypatch)
    (tmp_path / "red").mkdir()
    (tmp_path / "red" / "tone").symlink_to(make_adapter())
    monkeypatch.setenv("SHELF", str(tmp_path))
    try:
        async with connect(config) as client:
            done = await push(client, "shelf://red/tone")
            assert (done.status_code, done.json()["live"]) == (201, True)
            refused = await push(client, "shelf://../tone")
            assert refused.status_code == 400 and "shelf://room/name" in refused.json()["error"]["message"]
            gone = await push(client, "shelf://red/gone")
            assert gone.status_code == 422 and "has no" in gone.json()["error"]["message"]
        with pytest.raises(BadRequest, match="tenant default alone"):
            parse("shelf://red/tone", trusted=False)
    finally:
        offered.cache_clear()
