"""Two real servers for all tests that do not have to stop them, and adapters whose answers tell who gave them."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.support.collector import Collector
from tests.support.hub import Hub, running
from tests.support.lora import WORDS, trained, variant
from tests.support.server import KEYS, MAX_UPLOAD, SMALL, WATCHED, Server, tail
from tests.support.waiting import eventually


@pytest.fixture(scope="session")
def adapters() -> dict[str, Path]:
    """word -> the folder of an adapter that answers everything with it."""
    return trained(*WORDS)


@pytest.fixture(scope="session")
def hub() -> Iterator[Hub]:
    """What the server takes for the hub."""
    with running(Hub()) as hub:
        yield hub


@pytest.fixture(scope="session")
def collector(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Collector]:
    """Where the server's traces go."""
    with Collector(tmp_path_factory.mktemp("collector")) as collector:
        yield collector


@pytest.fixture(scope="session")
def server(
    adapters: dict[str, Path], hub: Hub, collector: Collector, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """With keys, a small upload limit, traces, a second front end, and the real model."""
    folder = tmp_path_factory.mktemp("server")
    settings = (
        "--max-upload-bytes",
        str(MAX_UPLOAD),
        "--source-roots",
        str(adapters["alpha"].parent),
        # All tests' versions, none of them under `other`.
        "--max-labelled-versions",
        "1000",
        # Long streams are sent by another process; those of other tests' servers are not.
        "--front-ends",
        "2",
        *WATCHED,
        *SMALL,
    )
    traces = {
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{collector.url}/v1/traces",
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
        "OTEL_BSP_SCHEDULE_DELAY": "500",
    }
    # What vLLM keeps of responses: see test_routes.py.
    environ = {**KEYS, "HF_ENDPOINT": hub.url, "VLLM_ENABLE_RESPONSES_API_STORE": "1", **traces}
    with Server(folder / "data", folder / "log", *settings, **environ) as server:
        yield server


@pytest.fixture(scope="session")
def slowable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Another one with keys, which tells all that it does (log level debug). The version whose id stands in the file
    `slow` beside its data directory answers slowly: see tests.support.slowed.
    """
    folder = tmp_path_factory.mktemp("slowable")
    environ = {"SLOWED": str(folder / "slow"), **KEYS}
    settings = ("--log-level", "debug", *WATCHED, *SMALL)
    with Server(folder / "data", folder / "log", *settings, module="tests.support.slowed", **environ) as server:
        yield server


@pytest.fixture(scope="session")
def voice(server: Server, adapters: dict[str, Path]) -> str:
    """A name that stays: its only version answers alpha."""
    server.upload("voice", adapters["alpha"]).raise_for_status()
    return "voice"


@pytest.fixture(scope="session")
def faint(server: Server, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A name that stays: an adapter too weak to change words, for answers that need the base's skill."""
    folder = variant(adapters["bravo"], tmp_path_factory.mktemp("faint"), scale=0.05)
    server.upload("faint", folder).raise_for_status()
    return "faint"


@pytest.fixture
def name(request: pytest.FixtureRequest, server: Server, voice: str, faint: str) -> Iterator[str]:
    """An adapter's name that no other test has; its versions go with the test, from engine and disk."""
    name = re.sub(r"\W+", "-", request.node.name.removeprefix("test_")).strip("-")[:64]
    before = server.stored()
    yield name
    server.http.delete(f"/v1/adapters/{name}")
    assert eventually(lambda: not server.resident(name) and server.stored() <= before), f"{name} left something behind"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    for server in getattr(item, "funcargs", {}).values():
        if report.failed and isinstance(server, Server):
            report.sections.append(("the server's log", tail(server.full_log)))
    return report
