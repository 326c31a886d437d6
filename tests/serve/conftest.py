"""A server without an engine: real routes, registry, store and files over a backend that answers by itself."""

from __future__ import annotations

import gc
import os
import shutil
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import httpx
import openai
import pytest
import torch
from safetensors.torch import save_file

from serve.config import Config, keys_hashed, load
from tests.support import loop_guard, tiny
from tests.support import postgres as postgresql
from tests.support.app import Started, issued
from tests.support.backend import FakeBackend
from tests.support.hub import Hub, running
from tests.support.watched_traffic import askers
from tests.support.zygote import Zygote

loop_guard.install()
# What thousands of tests leave takes over two seconds to look through: within a request that is a deadline. So garbage
# is collected between tests alone, as a server does it when it is quiet.
COLLECT_SECONDS = 60.0
gc.set_threshold(*gc.get_threshold()[:2], 1_000_000)
_collected = time.monotonic()


@pytest.fixture(autouse=True)
def loop_never_waits() -> Iterator[None]:
    """No request makes the event loop wait for a disk, a database, the network, or a full look for garbage."""
    global _collected
    with loop_guard.guarded():
        yield
    if time.monotonic() - _collected > COLLECT_SECONDS:
        gc.collect()
        _collected = time.monotonic()


@pytest.fixture(autouse=True)
def same_askers() -> None:
    askers.begin()


@pytest.fixture
def zygote(tmp_path: Path, tiny_model: Path) -> Iterator[Zygote]:
    """Servers of one data directory that can be killed, whose trainer is the stand-in."""
    zygote = Zygote(tmp_path / "data", tiny_model, STAND_IN='{"seconds": 0.15}')
    yield zygote
    zygote.close()


@pytest.fixture
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No LORADOCK_* variable, neither a user's nor that of these tests: what reads the environment finds none."""
    for name in [name for name in os.environ if name.startswith("LORADOCK_")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with a configuration and no weights: enough to know the modules."""
    return tiny.model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture
def make_adapter(tmp_path: Path) -> Callable[..., Path]:
    """A factory of PEFT folders for `tiny_model`; another seed gives other bytes."""
    return lambda seed=0, rank=2: tiny.adapter(tmp_path / f"adapter-{seed}-{rank}", seed, rank)


@pytest.fixture
async def backend(tiny_model: Path) -> FakeBackend:
    return FakeBackend(str(tiny_model))


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path) -> Config:
    return load([str(tiny_model), "--name", "base", "--data-dir", str(tmp_path / "data")], {})


@pytest.fixture
def connect(backend: FakeBackend) -> Callable[..., Any]:
    """`async with connect(config) as client`: a client of a started server."""
    return lambda config, backend=backend: Started(config, backend)


@pytest.fixture
async def client(connect: Callable[..., Any], config: Config) -> AsyncIterator[httpx.AsyncClient]:
    async with connect(config) as client:
        yield client


@pytest.fixture
async def operator(connect: Callable[..., Any], config: Config) -> AsyncIterator[httpx.AsyncClient]:
    """A client with the admin key of a server that has keys."""
    async with connect(replace(config, admin_keys=keys_hashed(["run"]))) as client:
        client.headers["authorization"] = "Bearer run"
        yield client


@pytest.fixture
def issue(operator: httpx.AsyncClient) -> Callable[..., Any]:
    """`await issue("acme", "inference", concurrent=1)`: a client of that tenant, with a key that was just issued."""

    return partial(issued, operator)


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """A PostgreSQL server; SQLAlchemy's URL up to the database's name."""
    bin = postgresql.programs()
    if bin is None:
        if os.environ.get("LORADOCK_TEST_POSTGRES"):
            pytest.fail("LORADOCK_TEST_POSTGRES is set, and PostgreSQL or psycopg is not installed")
        pytest.skip("PostgreSQL is not installed")
    with postgresql.running(bin) as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database's URL."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/registry.db"
    return postgresql.database(request.getfixturevalue("postgres"))


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An S3 server that speaks the real protocol, and a client of it."""
    moto = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    boto3 = pytest.importorskip("boto3")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    for name, value in {
        "AWS_ENDPOINT_URL_S3": address, "AWS_ACCESS_KEY_ID": "me", "AWS_SECRET_ACCESS_KEY": "mine",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    # What earlier tests of this process left there.
    httpx.post(f"{address}/moto-api/reset", timeout=60).raise_for_status()
    client = boto3.client("s3", endpoint_url=address)
    client.create_bucket(Bucket="models")
    yield client
    server.stop()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub, which this process's own client asks."""
    from huggingface_hub import _commit_api, constants

    with running(Hub()) as hub:
        # Both are made of HF_ENDPOINT when the client is imported.
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setenv("HF_TOKEN", "the-servers-own")
        # Large files go by LFS: xet is another service than the hub.
        monkeypatch.setattr(_commit_api, "is_xet_available", lambda: False)
        yield hub


@pytest.fixture
def watched(config, backend, tiny_model, tmp_path):
    """A configuration of a model that has an embedding table, with short baselines."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    table = torch.randn(32, tiny.HIDDEN, generator=torch.Generator().manual_seed(0))
    save_file({"model.embed_tokens.weight": table}, folder / "model.safetensors")
    backend.model = str(folder)
    return replace(config, model=str(folder), drift_reference=100, drift_threshold=1e4)


@pytest.fixture
def sdk() -> Callable[[httpx.AsyncClient], openai.AsyncOpenAI]:
    """OpenAI's client, which speaks with the same server on the same key."""

    def made(client: httpx.AsyncClient) -> openai.AsyncOpenAI:
        key = client.headers.get("authorization", "Bearer none").removeprefix("Bearer ")
        http = httpx.AsyncClient(transport=client._transport)
        return openai.AsyncOpenAI(base_url="http://localhost/v1", api_key=key, http_client=http, max_retries=0)

    return made
