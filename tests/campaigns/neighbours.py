"""`make neighbours`: the database, the object store, the hub and the disk made slow, refusing and cut in half.

One server, then two that share a registry (PostgreSQL) and a store (S3), each over a backend that answers with the name
of the version, under traffic. During each fault somebody pushes and an operator rolls back; afterwards everything must
be as it was acknowledged, within seconds and without a restart.

    python -m tests.campaigns.neighbours [--seconds 8] [--only TEXT] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import make_url

from tests.support import hub as hubs
from tests.support import postgres, tiny
from tests.support.app import upload
from tests.support.proxy import Mode, Proxy, tcp, unix
from tests.support.server import ROOT, bearer, done, environment, free_port

ADMIN = "an-admin-key-of-the-campaign"
FAULTS: tuple[Mode, ...] = ("slow", "refusing", "halves")
ROLLBACK_SECONDS = 5.0
BACK_SECONDS = 10.0


@dataclass
class Seen:
    """What one fault of one neighbour did."""

    neighbour: str
    fault: str
    servers: int
    answers: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    rollback: float | None = None
    push: str = ""
    health: float = 0.0
    back: float | None = None
    lost: list[str] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        late = (
            self.rollback is None or self.rollback > ROLLBACK_SECONDS or self.back is None or self.back > BACK_SECONDS
        )
        return bool(self.wrong or self.lost or late)


class Lone:
    """A server in a process of its own, without an engine."""

    def __init__(self, folder: Path, model: Path, flags: list[str], environ: dict[str, str]) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "tests.support.lone", str(model), str(folder), str(self.port), *flags]
        self.log = folder.with_suffix(".log")
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment(LORADOCK_ADMIN_KEYS=ADMIN, **environ), stdout=out, stderr=out
            )

    def client(self, timeout: float = 30) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers=bearer(ADMIN), timeout=timeout)

    def wait(self) -> None:
        with self.client(2) as client:
            for _ in range(300):
                with suppress(httpx.TransportError):
                    if client.get("/ready").status_code == 200:
                        return
                time.sleep(0.1)
        raise RuntimeError(f"not ready: {self.log.read_text()[-2000:]}")

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Stage:
    """The servers, what stands between them and their neighbours, and what was acknowledged."""

    def __init__(self, servers: list[Lone], proxies: dict[str, Proxy], disk: Path | None, adapters: Path) -> None:
        self.servers = servers
        self.proxies = proxies
        self.disk = disk
        self.adapters = adapters
        self.pushed = 0
        self.ids: dict[int, str] = {}
        self.live = 0
        with servers[0].client() as client:
            for _ in range(2):
                self.push(client)

    def push(self, client: httpx.Client) -> dict[str, Any]:
        """A version that did not exist; it is live once this returns."""
        self.pushed += 1
        version = done(
            client.post("/v1/adapters", **upload(tiny.adapter(self.adapters / f"n{self.pushed}", self.pushed, 2)))
        )
        self.ids[version["version"]] = version["id"]
        self.live = version["version"]
        return version

    def become(self, neighbour: str, fault: Mode) -> None:
        if neighbour != "disk":
            self.proxies[neighbour].become(fault)
        elif self.disk is not None:
            _disk(self.disk, fault)


def _disk(folder: Path, fault: Mode) -> None:
    """A frozen file system is slow, a full one refuses, one with a KiB left takes half of what is written."""
    filler = folder / "filler"
    if fault == "slow":
        assert _tool("fsfreeze", "-f", str(folder))
        threading.Timer(5, _tool, ("fsfreeze", "-u", str(folder))).start()
    elif fault == "refusing":
        _fill(filler, leave=0)
    elif fault == "halves":
        _fill(filler, leave=1024)
    else:
        filler.unlink(missing_ok=True)


def _fill(filler: Path, leave: int) -> None:
    """Write until only so many bytes are left."""
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 20))
    os.truncate(filler, max(0, filler.stat().st_size - leave))


class Traffic:
    """Who asks, looks after health and pushes while a neighbour fails."""

    def __init__(self, stage: Stage, seen: Seen, possible: set[str]) -> None:
        self.stage = stage
        self.seen = seen
        self.possible = possible
        self.answers: Counter[str] = Counter()
        self.acknowledged: list[int] = []
        self._stop = threading.Event()
        jobs = [(job, server) for server in stage.servers for job in (self._ask, self._health)]
        self._threads = [threading.Thread(target=job, args=(server,)) for job, server in jobs]
        self._threads.append(threading.Thread(target=self._push))

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(90)
        self.seen.answers = dict(self.answers)

    def _ask(self, server: Lone) -> None:
        with server.client(10) as client:
            while not self._stop.wait(0.05):
                try:
                    answer = client.post("/v1/chat/completions", json={"model": "tone", "messages": []})
                except httpx.TransportError as error:
                    self.answers[type(error).__name__] += 1
                    continue
                self.answers[str(answer.status_code)] += 1
                if answer.is_success and answer.json()["model"] not in self.possible:
                    self.seen.wrong.append(f"{answer.json()['model']} answered, {sorted(self.possible)} may")

    def _health(self, server: Lone) -> None:
        with server.client(30) as client:
            while not self._stop.wait(0.1):
                began = time.monotonic()
                with suppress(httpx.TransportError):
                    client.get("/health")
                self.seen.health = max(self.seen.health, time.monotonic() - began)

    def _push(self) -> None:
        began = time.monotonic()
        folder = tiny.adapter(self.stage.adapters / f"p{random.getrandbits(32)}", random.getrandbits(20), 2)
        with self.stage.servers[-1].client(60) as client:
            try:
                answer = client.post("/v1/adapters", **upload(folder, "other"))
            except httpx.TransportError as error:
                self.seen.push = f"{type(error).__name__} after {time.monotonic() - began:.1f} s"
                return
        self.seen.push = f"{answer.status_code} after {time.monotonic() - began:.1f} s"
        if answer.is_success:
            self.acknowledged.append(answer.json()["version"])


def measure(stage: Stage, neighbour: str, fault: Mode, seconds: float) -> Seen:
    """One fault of one neighbour, for so long, and what it did."""
    seen = Seen(neighbour, fault, len(stage.servers))
    earlier = stage.live
    with stage.servers[0].client() as client:
        stage.push(client)
    for server in stage.servers:  # a server that never heard of the version could not answer by it
        with server.client() as client:
            while done(client.get("/v1/adapters/tone"))["live"] != stage.live:
                time.sleep(0.1)
    traffic = Traffic(stage, seen, {stage.ids[stage.live], stage.ids[earlier]})
    stage.become(neighbour, fault)
    traffic.start()
    time.sleep(0.5)
    _roll_back(stage, seen, seconds)
    stage.become(neighbour, "pass")
    lifted = time.monotonic()
    while seen.back is None and time.monotonic() - lifted < 60:
        if all(_works(server) for server in stage.servers):
            seen.back = time.monotonic() - lifted
        else:
            time.sleep(0.1)
    traffic.stop()
    for server in stage.servers:
        with server.client() as client:
            seen.lost += _lost(stage, seen, client, traffic.acknowledged)
    return seen


def _roll_back(stage: Stage, seen: Seen, seconds: float) -> None:
    """Roll back, again until it is done; `seconds` are over when this returns."""
    began = time.monotonic()
    expected = stage.live
    with stage.servers[0].client(60) as client, suppress(httpx.TransportError):
        while seen.rollback is None and time.monotonic() - began < seconds:
            answer = client.post("/v1/adapters/tone/rollback", json={"expected_version": expected})
            if answer.is_success:
                seen.rollback = time.monotonic() - began
                stage.live = answer.json()["version"]
            else:
                time.sleep(0.2)
    time.sleep(max(0.0, seconds - (time.monotonic() - began)))


def _lost(stage: Stage, seen: Seen, client: httpx.Client, acknowledged: list[int]) -> list[str]:
    """What this server does not have though it was acknowledged."""
    lost = []
    tone = done(client.get("/v1/adapters/tone"))
    if seen.rollback is not None and tone["live"] != stage.live:
        lost.append(f"v{tone['live']} is live, v{stage.live} was acknowledged")
    if missing := set(stage.ids) - {version["version"] for version in tone["versions"]}:
        lost.append(f"versions {sorted(missing)} are gone")
    if acknowledged:
        there = {version["version"] for version in done(client.get("/v1/adapters/other"))["versions"]}
        if not set(acknowledged) <= there:
            lost.append("a push that was acknowledged is gone")
    return lost


def _works(server: Lone) -> bool:
    """Ready, nothing degraded, and it changes what it is told to."""
    with server.client(5) as client, suppress(httpx.TransportError):
        ready = client.get("/ready")
        changed = client.post("/v1/adapters/tone/visibility", json={"visibility": random.choice(["private", "shared"])})
        return ready.status_code == 200 and not ready.json().get("degraded") and changed.is_success
    return False


@contextmanager
def staged(folder: Path, servers: int) -> Iterator[Stage]:
    """So many servers; two share PostgreSQL and S3, one has them all the same, so that each neighbour matters."""
    programs = postgres.programs()
    assert programs is not None, "PostgreSQL and psycopg are needed"
    import boto3
    from moto.server import ThreadedMotoServer

    with ExitStack() as stack:
        database = postgres.database(stack.enter_context(postgres.running(programs)))
        place, name = make_url(database).query["host"], make_url(database).database
        s3 = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        s3.start()
        stack.callback(s3.stop)
        hub = stack.enter_context(hubs.running(hubs.Hub()))
        proxies = {
            "database": stack.enter_context(Proxy(unix(f"{place}/.s.PGSQL.5432"))),
            "object store": stack.enter_context(Proxy(tcp(s3.get_host_and_port()[1]))),
            "hub": stack.enter_context(Proxy(tcp(int(hub.url.rpartition(":")[2])))),
        }
        environ = {
            "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{proxies['object store'].port}",
            "AWS_ACCESS_KEY_ID": "me",
            "AWS_SECRET_ACCESS_KEY": "mine",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "HF_ENDPOINT": f"http://127.0.0.1:{proxies['hub'].port}",
        }
        direct = "http://{}:{}".format(*s3.get_host_and_port())
        keys = {"aws_access_key_id": "me", "aws_secret_access_key": "mine", "region_name": "us-east-1"}
        boto3.client("s3", endpoint_url=direct, **keys).create_bucket(Bucket="neighbours")
        url = f"postgresql+psycopg://loradock@127.0.0.1:{proxies['database'].port}/{name}"
        flags = ["--registry", url, "--blobs", "s3://neighbours/adapters"]
        (folder / "model").mkdir()
        model = tiny.model(folder / "model")
        disk = stack.enter_context(_own_disk(folder / "disk"))
        started = []
        for number in range(servers):
            server = Lone((disk or folder) / f"data-{number}", model, flags, environ)
            stack.callback(server.stop)
            server.wait()
            started.append(server)
        (folder / "adapters").mkdir()
        yield Stage(started, proxies, disk, folder / "adapters")


@contextmanager
def _own_disk(folder: Path) -> Iterator[Path | None]:
    """A small file system that can be frozen and filled, where one may be mounted."""
    folder.mkdir()
    image = folder.with_suffix(".img")
    with image.open("wb") as file:
        file.truncate(600 << 20)
    mounted = _tool("mkfs.ext4", "-q", str(image)) and _tool("mount", "-o", "loop", str(image), str(folder))
    try:
        yield folder if mounted else None
    finally:
        if mounted:
            _tool("fsfreeze", "-u", str(folder))
            _tool("umount", "-l", str(folder))


def _tool(*words: str) -> bool:
    """Whether this command of the system's, which may lie in root's PATH alone, ended well."""
    found = shutil.which(words[0], path=os.pathsep.join((os.environ["PATH"], "/usr/sbin", "/sbin")))
    return found is not None and subprocess.run([found, *words[1:]], capture_output=True, check=False).returncode == 0


def table(rows: list[Seen]) -> str:
    lines = [
        "| neighbour | fault | servers | answers | wrong | lost | rolled back after "
        "| push meanwhile | /health at most | back after |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        answers = ", ".join(f"{count} x {status}" for status, count in sorted(row.answers.items()))
        lines.append(
            f"| {row.neighbour} | {row.fault} | {row.servers} | {answers} | {len(row.wrong)} | {len(row.lost)} "
            f"| {_seconds(row.rollback)} | {row.push} | {row.health * 1000:.0f} ms | {_seconds(row.back)} |"
        )
    return "\n".join(lines)


def _seconds(value: float | None) -> str:
    return "never" if value is None else f"{value:.1f} s"


def run(folder: Path, servers: int, seconds: float, only: str = "") -> list[Seen]:
    """Every fault of every neighbour."""
    rows = []
    with staged(folder, servers) as stage:
        for neighbour in [*stage.proxies, *["disk"] * (stage.disk is not None)]:
            for fault in FAULTS:
                if only in f"{neighbour} {fault}":
                    rows.append(measure(stage, neighbour, fault, seconds))
                    print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
                    for line in [*rows[-1].wrong[:3], *rows[-1].lost[:3]]:
                        print(f"    {line}", file=sys.stderr, flush=True)
    return rows


def main() -> int:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=8, help="how long each fault lasts")
    parser.add_argument("--servers", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--only", default="", help="neighbours and faults with this text")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    words = parser.parse_args()
    rows = []
    for servers in words.servers:
        with tempfile.TemporaryDirectory() as folder:
            rows += run(Path(folder), servers, words.seconds, words.only)
    print(table(rows))
    if words.json:
        words.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    failed = [row for row in rows if row.failed]
    print(f"\n{len(rows)} faults, {len(failed)} not as promised")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
