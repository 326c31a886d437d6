"""The adapter client and its commands against a small server that keeps adapters in a dictionary, over real sockets."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send
from typer.testing import CliRunner

from serve.cli.adapters import adapters_app
from serve.client.adapter_client import AdapterClient, Refused, Retry, Unreachable
from serve.errors import AdapterRejected, ConfigError, Conflict, EngineUnavailable, Forbidden, NotFound, Unauthorized
from tests.support.http_service import Handler, serving
from tests.support.listening import listening_beside

KEY = "sk-admin"


def refusal(status: int, message: str, **more: Any) -> JSONResponse:
    error = {"message": message, "type": "some_error", "param": None, "code": None, **more}
    return JSONResponse({"error": error}, status_code=status, headers=more.pop("headers", None))


@dataclass
class Depot:
    """Versions of adapters by name, as digests in order; `next_answers` are given before the real ones."""

    versions: dict[str, list[str]] = field(default_factory=dict)
    live: dict[str, list[int]] = field(default_factory=dict)
    next_answers: list[Callable[[], Response]] = field(default_factory=list)
    asked: list[tuple[str, str]] = field(default_factory=list)
    uploads: list[dict[str, bytes]] = field(default_factory=list)
    shares: dict[str, Any] = field(default_factory=dict)
    pinned: int | None = None
    sources: list[Any] = field(default_factory=list)
    analysis: dict[str, Any] | None = None
    said: list[Any] = field(default_factory=list)
    url: str = ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        self.asked.append((request.method, scope["raw_path"].decode()))
        if self.next_answers:
            await request.body()
            response = self.next_answers.pop(0)()
        elif request.headers.get("authorization") != f"Bearer {KEY}":
            response = refusal(401, "this key was not issued here")
        else:
            app = Starlette(
                routes=[
                    Route("/v1/adapters", self.push, methods=["POST"]),
                    Route("/v1/adapters", self.list),
                    Route("/v1/adapters/{name}", self.show),
                    Route("/v1/adapters/{name}/drift", self.drift),
                    Route("/v1/adapters/{name}/promote", self.promote, methods=["POST"]),
                    Route("/v1/adapters/{name}/rollback", self.rollback, methods=["POST"]),
                    Route("/v1/adapters/{name}/{kind:str}", self.share, methods=["POST"]),
                    Route("/v1/adapters/{name}/pin", self.unpin, methods=["DELETE"]),
                    Route("/v1/adapters/{name}", self.remove, methods=["DELETE"]),
                    Route("/v1/adapters/{name}/versions/{version:int}", self.remove, methods=["DELETE"]),
                ]
            )
            return await app(scope, receive, send)
        await response(scope, receive, send)

    async def share(self, request: Request) -> Response:
        kind, body = request.path_params["kind"], await request.json()
        if kind == "pin":
            self.pinned = body.get("version", self.live[request.path_params["name"]][-1])
        else:
            self.shares[kind] = body if body["weight"] else None
        return JSONResponse(self.described(request.path_params["name"]))

    async def unpin(self, request: Request) -> Response:
        self.pinned = None
        return JSONResponse(self.described(request.path_params["name"]))

    async def push(self, request: Request) -> Response:
        if request.headers["content-type"] == "application/json":
            self.sources.append(await request.json())
            told = {"name": self.sources[-1]["name"], "version": 1, "id": "x", "live": self.sources[-1]["promote"]}
            return JSONResponse(told, status_code=201)
        async with request.form() as form:
            name = str(form["name"])
            files = [part for part in form.getlist("files") if isinstance(part, UploadFile)]
            received = {str(part.filename): await part.read() for part in files}
            promote = form["promote"] == "true"
        self.uploads.append(received)
        digest = hashlib.sha256(b"".join(received.values())).hexdigest()
        known = self.versions.setdefault(name, [])
        status = 200 if digest in known else 201
        if status == 201:
            known.append(digest)
        version = known.index(digest) + 1
        if promote:
            self.live.setdefault(name, []).append(version)
        told = {"name": name, "version": version, "id": f"{name}@{digest[:12]}", "digest": digest}
        return JSONResponse({**told, "live": promote}, status_code=status)

    async def list(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self.described(name) for name in self.versions]})

    async def show(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self.versions:
            return refusal(404, f"no adapter is called {name!r}")
        return JSONResponse(self.described(name))

    async def drift(self, request: Request) -> Response:
        if self.analysis is None:
            return refusal(404, "this server is an older one")
        return JSONResponse({"object": "adapter.drift", "versions": [], "canary": self.analysis})

    async def promote(self, request: Request) -> Response:
        name, body = request.path_params["name"], await request.json()
        if body.get("expected_version") not in (None, self.live[name][-1]):
            return refusal(409, f"version {self.live[name][-1]} is live by now")
        self.live[name].append(body["version"])
        return JSONResponse(self.described(name))

    async def rollback(self, request: Request) -> Response:
        name = request.path_params["name"]
        self.said.append(await request.json())
        self.live[name].pop()
        version = self.live[name][-1]
        return JSONResponse({**self.described(name)["versions"][version - 1], "name": name, "live": True})

    async def remove(self, request: Request) -> Response:
        name, version = request.path_params["name"], request.path_params.get("version")
        if request.query_params.get("force") != "true" and version in (None, self.live[name][-1]):
            return refusal(409, f"{name} is live; add force to remove it all the same")
        if version is None:
            del self.versions[name]
        else:
            self.versions[name][version - 1] = "removed"
        return Response(status_code=204)

    def described(self, name: str) -> dict[str, Any]:
        live = self.live.get(name)
        versions = [
            {
                "version": number,
                "id": f"{name}@{digest[:12]}",
                "digest": digest,
                "created": 1_800_000_000,
                "pinned": number == self.pinned,
            }
            for number, digest in enumerate(self.versions[name], 1)
        ]
        history = [{"when": 1_800_000_000.5, "what": "promote", "to_version": number} for number in live or []]
        told = {"name": name, "live": live[-1] if live else None, "versions": versions, "history": history}
        return told | self.shares


@pytest.fixture
def depot() -> Iterator[Depot]:
    depot = Depot()
    with listening_beside(depot, log_level="critical", lifespan="off") as depot.url:
        yield depot


@pytest.fixture
def waits() -> list[float]:
    return []


@pytest.fixture
def client(depot: Depot, waits: list[float]) -> Iterator[AdapterClient]:
    with AdapterClient(depot.url, KEY, sleep=waits.append) as client:
        yield client


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "support-lora"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "adapter_model.safetensors").write_bytes(b"weights" * 50_000)
    (folder / "optimizer.pt").write_text("not for the server")
    return folder


# -- push


def test_a_push_sends_the_two_files_of_a_peft_folder_and_nothing_else(
    client: AdapterClient, depot: Depot, folder: Path
) -> None:
    told = client.push("support", folder)
    assert (told["name"], told["version"], told["live"]) == ("support", 1, True)
    assert depot.uploads == [
        {
            "adapter_config.json": b'{"peft_type": "LORA"}',
            "adapter_model.safetensors": b"weights" * 50_000,
        }
    ]


def test_a_card_goes_along_so_that_its_license_can_be_read(client: AdapterClient, depot: Depot, folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: mit\n---")
    client.push("support", folder)
    assert depot.uploads[0]["README.md"] == b"---\nlicense: mit\n---"


def test_an_archive_is_sent_as_it_is(client: AdapterClient, depot: Depot, tmp_path: Path) -> None:
    archive = tmp_path / "lora.tar.gz"
    archive.write_bytes(b"\x1f\x8bnot looked into")
    client.push("support", archive, promote=False)
    assert depot.uploads == [{"lora.tar.gz": b"\x1f\x8bnot looked into"}]
    assert depot.live == {}


def test_the_same_bytes_twice_are_one_version(client: AdapterClient, folder: Path) -> None:
    assert client.push("support", folder)["version"] == client.push("support", folder)["version"] == 1


def test_progress_counts_the_bytes_of_the_files(client: AdapterClient, folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    client.push("support", folder, progress=lambda sent, total: seen.append((sent, total)))
    total = 350_000 + len('{"peft_type": "LORA"}')
    assert seen[0] == (0, total)
    assert seen[-1] == (total, total)
    assert [sent for sent, _ in seen] == sorted(sent for sent, _ in seen)


class Swallow(Handler):
    """Takes an upload without keeping it."""

    def do_POST(self) -> None:
        left = int(self.headers["Content-Length"])
        while left:
            left -= len(self.rfile.read(min(left, 1 << 16)))
        self.reply(201, b'{"name": "big", "version": 1}')


def test_a_large_upload_is_never_held_in_memory(folder: Path) -> None:
    with (folder / "adapter_model.safetensors").open("wb") as weights:
        weights.truncate(64 << 20)
    with serving(Swallow) as url, AdapterClient(url) as client:
        tracemalloc.start()
        client.push("big", folder)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 8 << 20


class Dropper:
    """Stands before the depot: drops the first connections in mid-upload, and passes the rest on."""

    def __init__(self, target: str, drops: int) -> None:
        self._target = int(target.rpartition(":")[2])
        self._drops = drops
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            if self._drops:
                self._drops -= 1
                client.recv(1000)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # reset, not end
                client.close()
                continue
            upstream = socket.create_connection(("127.0.0.1", self._target))
            for source, sink in ((client, upstream), (upstream, client)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def close(self) -> None:
        self._listening.close()


def test_push_restarts_after_a_dropped_connection(depot: Depot, folder: Path, waits: list[float]) -> None:
    dropper = Dropper(depot.url, drops=2)
    starts: list[int] = []
    with AdapterClient(dropper.url, KEY, sleep=waits.append) as client:
        told = client.push("support", folder, progress=lambda sent, total: starts.append(sent))
    dropper.close()
    assert told["version"] == 1
    assert depot.uploads[0]["adapter_model.safetensors"] == b"weights" * 50_000
    assert len(waits) == 2
    assert starts.count(0) == 3


def test_a_change_that_the_server_may_have_seen_is_not_repeated(depot: Depot, waits: list[float]) -> None:
    dropper = Dropper(depot.url, drops=1)
    with AdapterClient(dropper.url, KEY, sleep=waits.append) as client, pytest.raises(Unreachable, match="dropped"):
        client.rollback("support")
    dropper.close()
    assert waits == []


def test_a_busy_server_is_given_the_time_it_asks_for(
    client: AdapterClient, depot: Depot, folder: Path, waits: list[float]
) -> None:
    depot.next_answers = [lambda: refusal(503, "the engine is starting", headers={"Retry-After": "7"})]
    assert client.push("support", folder)["version"] == 1
    assert waits == [7.0]


def test_patience_ends(depot: Depot, folder: Path, waits: list[float]) -> None:
    depot.next_answers = [lambda: refusal(503, "the engine is gone")] * 9
    with (
        AdapterClient(depot.url, KEY, sleep=waits.append, retry=Retry(attempts=3)) as client,
        pytest.raises(EngineUnavailable, match="the engine is gone"),
    ):
        client.push("support", folder)
    assert len(depot.asked) == 3
    assert waits[0] < waits[1]


def test_an_unreachable_server_is_told_after_bounded_attempts(folder: Path, waits: list[float]) -> None:
    with (
        AdapterClient("http://127.0.0.1:9", sleep=waits.append) as client,
        pytest.raises(Unreachable, match="is the server running"),
    ):
        client.push("support", folder)
    assert len(waits) == 3


def test_what_is_no_adapter_is_refused_before_a_byte_is_sent(client: AdapterClient, depot: Depot, folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ConfigError, match="pickle"):
        client.push("support", folder)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(ConfigError, match=r"adapter_model\.safetensors not found"):
        client.push("support", folder)
    with pytest.raises(ConfigError, match="does not exist"):
        client.push("support", folder / "nowhere")
    with pytest.raises(ConfigError, match="is a file"):
        client.push("support", folder / "optimizer.pt")
    assert depot.asked == []


# -- the rest of the API


def test_list_show_promote_roll_back_and_remove(client: AdapterClient, depot: Depot, folder: Path) -> None:
    client.push("support", folder)
    (folder / "adapter_config.json").write_text("{}")
    client.push("support", folder)
    assert [adapter["live"] for adapter in client.list()] == [2]
    assert client.promote("support", 1, expected_version=2)["live"] == 1
    assert client.rollback("support")["version"] == 2
    assert client.remove("support", 1) == {}
    assert next(version["digest"] for version in client.show("support")["versions"]) == "removed"
    client.remove("support", force=True)
    assert client.list() == []


def test_a_name_stays_one_segment_of_the_path(client: AdapterClient, depot: Depot) -> None:
    with pytest.raises(Refused):
        client.show("../../health")
    assert depot.asked == [("GET", "/v1/adapters/..%2F..%2Fhealth")]
    with pytest.raises(ConfigError):
        client.remove("..")


@pytest.mark.parametrize(
    ("status", "kind"), [(401, Unauthorized), (403, Forbidden), (404, NotFound), (409, Conflict), (418, Refused)]
)
def test_errors_are_typed_and_keep_the_servers_sentence(
    client: AdapterClient, depot: Depot, status: int, kind: type[Exception]
) -> None:
    depot.next_answers = [lambda: refusal(status, "because of this", code="why")]
    with pytest.raises(kind, match="because of this") as caught:
        client.rollback("support")
    assert getattr(caught.value, "code") == "why"  # noqa: B009


def test_a_rejected_adapter_brings_its_problems(client: AdapterClient, depot: Depot, folder: Path) -> None:
    depot.next_answers = [lambda: refusal(422, "2 tensors do not fit", problems=["a.lora_A", "b.lora_B"])]
    with pytest.raises(AdapterRejected, match="2 tensors do not fit") as caught:
        client.push("support", folder)
    assert caught.value.problems == ["a.lora_A", "b.lora_B"]


def test_another_product_is_recognized_as_one(client: AdapterClient, depot: Depot) -> None:
    depot.next_answers = [lambda: JSONResponse({"detail": "Not Found"}, status_code=404)]
    with pytest.raises(Refused, match="is it a loradock server"):
        client.list()
    depot.next_answers = [lambda: PlainTextResponse("<html>welcome</html>")]
    with pytest.raises(Refused, match="not JSON"):
        client.list()


# -- the commands


def cli(depot: Depot, *words: str, key: str = KEY) -> Any:
    return CliRunner().invoke(adapters_app, [*words, "--url", depot.url, "--key", key])


def test_the_commands_tell_a_whole_story(depot: Depot, folder: Path) -> None:
    assert "no adapters yet" in cli(depot, "list").stdout
    assert "support@v1" in cli(depot, "push", "support", str(folder)).stdout
    (folder / "adapter_config.json").write_text("{}")
    stored = cli(depot, "push", "support", str(folder), "--no-promote").stdout
    assert "loradock adapters promote support@v2" in stored
    assert cli(depot, "promote", "support", "v2", "--expect", "1").stdout == "support@v2 is live\n"
    assert cli(depot, "list").stdout.splitlines()[1].split()[:2] == ["support", "v2"]
    assert cli(depot, "list").stdout.splitlines()[1].split()[-1] == "2"
    shown = cli(depot, "show", "support").stdout
    assert re.search(r"^  v2 +live ", shown, re.M) and re.search(r"^  v1 +- ", shown, re.M)
    assert re.search(r"^  2027-01-\S+ \S+  promote +v2$", shown, re.M)
    assert (
        cli(depot, "rollback", "support", "--expect", "2", "--why", "complaints").stdout == "support@v1 is live again\n"
    )
    assert depot.said[-1] == {"expected_version": 2, "why": "complaints"}
    assert cli(depot, "rm", "support@v2").stdout == "support@v2 is removed\n"
    assert cli(depot, "rm", "support", "--force").exit_code == 0


def test_a_live_adapter_is_removed_only_by_somebody_who_means_it(depot: Depot, folder: Path, monkeypatch: Any) -> None:
    cli(depot, "push", "support", str(folder))
    refused = cli(depot, "rm", "support")
    assert refused.exit_code == 2 and "support is live (v1 of 1 version)" in refused.stderr
    assert "give --yes" in refused.stderr and "support" in depot.versions
    monkeypatch.setattr("serve.cli.adapters._asks", lambda: True)
    words = ["rm", "support", "--url", depot.url, "--key", KEY]
    assert CliRunner().invoke(adapters_app, words, input="n\n").exit_code == 1 and "support" in depot.versions
    asked = CliRunner().invoke(adapters_app, [*words, "--force"], input="")
    assert asked.exit_code == 0 and "support" not in depot.versions
    monkeypatch.undo()
    cli(depot, "push", "support", str(folder), "--no-promote")
    depot.live.clear()
    assert cli(depot, "rm", "support", "--yes").exit_code != 2, "nothing is asked"


@pytest.mark.parametrize(
    "words",
    [("canary", "support", "2", "10%"), ("canary", "support@v2", "10%"), ("canary", "support@2", ".1", "--why", "b@v3"),
     ("canary", "--why", "a@v3", "support", "v2", "10 %"), ("shadow", "support@v2", "10%")],
)  # fmt: skip
def test_a_version_and_a_share_are_written_as_people_write_them(depot: Depot, folder: Path, words: Any) -> None:
    cli(depot, "push", "support", str(folder))
    done = cli(depot, *words)
    assert done.exit_code == 0, done.stderr
    assert depot.shares[words[0]]["version"] == 2 and depot.shares[words[0]]["weight"] == 0.1


def test_name_and_version_are_one_word_or_two(depot: Depot, folder: Path) -> None:
    cli(depot, "push", "support", str(folder))
    (folder / "adapter_config.json").write_text("{}")
    cli(depot, "push", "support", str(folder), "--no-promote")
    assert cli(depot, "promote", "support@v2", "--expect", "v1").stdout == "support@v2 is live\n"
    assert cli(depot, "pin", "support@v1").stdout == "support@v1 is pinned\n"
    both, first = cli(depot, "show", "support").stdout, cli(depot, "show", "support@v1").stdout
    assert re.search(r"^  v2 +live", both, re.M) and not re.search(r"^  v2 ", first, re.M)
    assert cli(depot, "show", "support@v7").exit_code == 1
    assert cli(depot, "promote", "support").exit_code == 2 and cli(depot, "promote", "support@v1", "2").exit_code == 2


@pytest.mark.parametrize("name", ["list", "ls"])
def test_a_command_has_the_names_that_people_try(depot: Depot, name: str) -> None:
    assert "no adapters yet" in cli(depot, name).stdout
    assert cli(depot, "lsx").exit_code == 2


def test_a_candidate_is_tried_out_from_a_terminal(depot: Depot, folder: Path) -> None:
    cli(depot, "push", "support", str(folder))
    assert cli(depot, "canary", "support", "v2", "0.1").stdout == "support@v2 answers 10% of the requests\n"
    assert cli(depot, "shadow", "support", "2", "1").stdout == "support@v2 also answers, unseen, 100% of the requests\n"
    shown = cli(depot, "show", "support").stdout
    assert "support@v2 answers 10% of the requests" in shown and "unseen" in shown
    assert cli(depot, "canary", "support", "2", "0").stdout == "support has no canary any more\n"
    assert json.loads(cli(depot, "shadow", "support", "2", "0", "--json").stdout)["shadow"] is None
    assert cli(depot, "canary", "support", "2", "1.5").exit_code == 2


def test_a_terminal_shows_how_a_canary_does_and_what_its_proof_will_take(depot: Depot, folder: Path) -> None:
    cli(depot, "push", "support", str(folder))
    cli(depot, "canary", "support", "2", "0.1")
    assert "against" not in cli(depot, "show", "support").stdout, "an older server does not say"
    analysis = {"canary": 2, "live": 1, "verdict": "undecided", "requests": 480, "askers": 3, "dealt_by": "request"}
    depot.analysis = analysis | {"checks": [{"check": "error", "requests_to_proof": None}]}
    assert "too early to say" in cli(depot, "show", "support").stdout
    signals = ("inter_token", "error", "refusal")
    checks = [
        {"check": "inter_token", "effect": 1.02, "requests_to_proof": {"low": 900, "expected": 1500, "high": None}},
        {"check": "error", "effect": 0.0, "requests_to_proof": {"low": 0, "expected": 0, "high": 0}},
        {"check": "refusal", "effect": 0.1, "requests_to_proof": {"low": None, "expected": None, "high": None}},
    ]
    depot.analysis = analysis | {"checks": checks}
    shown = cli(depot, "show", "support").stdout
    assert "v2 against v1: undecided after 480 requests of 3 askers, dealt by request: few askers" in shown
    assert [line.split() for line in shown.splitlines() if line.strip().startswith(signals)] == [
        ["inter_token", "1.02", "1500", "(900", "to", "no", "end)"],
        ["error", "0.0", "proved"],
        ["refusal", "0.1", "not", "in", "sight"],
    ]


def test_an_adapter_is_pinned_and_unpinned_from_a_terminal(depot: Depot, folder: Path) -> None:
    cli(depot, "push", "support", str(folder))
    assert cli(depot, "pin", "support", "v1").stdout == "support@v1 is pinned\n"
    assert re.search(r"^  v1 +live, pinned ", cli(depot, "show", "support").stdout, re.M)
    assert cli(depot, "list").stdout.splitlines()[1].split()[4] == "v1"
    assert json.loads(cli(depot, "pin", "support", "--json").stdout)["versions"][0]["pinned"] is True
    assert cli(depot, "unpin", "support").stdout == "support is pinned no more\n"
    assert json.loads(cli(depot, "unpin", "support", "--json").stdout)["versions"][0]["pinned"] is False


def test_an_address_is_pushed_for_the_server_to_fetch(depot: Depot) -> None:
    pushed = cli(depot, "push", "support", "hf://team/support@main", "--no-promote")
    assert "is stored" in pushed.stdout
    assert depot.sources == [{"name": "support", "source": "hf://team/support@main", "promote": False}]


def test_json_is_the_servers_answer(depot: Depot, folder: Path) -> None:
    assert json.loads(cli(depot, "push", "support", str(folder), "--json").stdout)["version"] == 1
    assert json.loads(cli(depot, "list", "--json").stdout)["data"][0]["name"] == "support"


def test_exit_codes_tell_a_script_what_to_do(depot: Depot, folder: Path) -> None:
    assert cli(depot, "list", key="wrong").exit_code == 1
    assert cli(depot, "push", "support", str(folder / "nowhere")).exit_code == 2
    assert cli(depot, "promote", "support", "latest").exit_code == 2
    assert cli(depot, "rm", "support@").exit_code == 2
    assert cli(depot, "push").exit_code == 2
    gone = CliRunner().invoke(adapters_app, ["list", "--url", "http://127.0.0.1:9"])
    assert (gone.exit_code, "is the server running?" in gone.stderr) == (3, True)


def test_with_json_an_error_is_the_servers_json_on_stderr_with_the_same_exit_code(depot: Depot, folder: Path) -> None:
    refused = cli(depot, "show", "nobody", "--json")
    assert (refused.exit_code, refused.stdout) == (1, "")
    error = json.loads(refused.stderr)["error"]
    assert error.keys() == {"message", "type", "param", "code"} and "nobody" in error["message"]
    depot.next_answers = [lambda: refusal(422, "it does not fit", problems=["layer 3: shape"])]
    rejected = cli(depot, "push", "support", str(folder), "--json")
    assert (rejected.exit_code, json.loads(rejected.stderr)["error"]["problems"]) == (1, ["layer 3: shape"])
    wrong = cli(depot, "promote", "support", "latest", "--json")
    assert (wrong.exit_code, json.loads(wrong.stderr)["error"]["type"]) == (2, "config_error")
    gone = CliRunner().invoke(adapters_app, ["list", "--url", "http://127.0.0.1:9", "--json"])
    assert (gone.exit_code, json.loads(gone.stderr)["error"]["type"]) == (3, "connection_error")


def test_problems_are_printed_one_a_line(depot: Depot, folder: Path) -> None:
    depot.next_answers = [lambda: refusal(422, "it does not fit", problems=["layer 3: shape"])]
    done = cli(depot, "push", "support", str(folder))
    assert done.exit_code == 1
    assert done.stderr == "loradock adapters: it does not fit\n  - layer 3: shape\n"
