"""kill -9 at any moment: what was acknowledged stays, what was not is there whole or not at all."""

from __future__ import annotations

import os
import random
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from tests.support.app import upload

# `make chaos` asks for 100.
KILLS = int(os.environ.get("LORADOCK_TEST_KILLS", "8"))
NAMES = ("north", "east", "south", "west")
ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class State:
    """One adapter: version -> digest, which is live, and how many numbers were ever given."""

    versions: dict[int, str] = field(default_factory=dict)
    live: int | None = None
    given: int = 0

    def pushed(self, digest: str) -> State:
        known = {digest: version for version, digest in self.versions.items()}
        if digest in known:
            return State(self.versions, known[digest], self.given)
        number = self.given + 1
        return State({**self.versions, number: digest}, number, number)

    def promoted(self, version: int) -> State:
        return State(self.versions, version, self.given)

    def without(self, version: int) -> State:
        return State(
            {number: digest for number, digest in self.versions.items() if number != version}, self.live, self.given
        )

    def seen(self) -> tuple[int | None, dict[int, str]]:
        return self.live, self.versions


class Writer:
    """The only one who changes its adapter; knows what it was told, and what it was not told."""

    def __init__(self, name: str, folders: list[Path], digests: dict[Path, str], seed: int) -> None:
        self.name, self.folders, self.digests = name, folders, digests
        self.draw = random.Random(seed)
        self.state = State()
        self.hoped: State | None = None
        self.acknowledged = 0
        self.refused: list[str] = []

    def work(self, client: httpx.Client) -> None:
        """Change things until the server is gone."""
        with suppress(httpx.TransportError):
            while True:
                self.change(client)

    def change(self, client: httpx.Client) -> None:
        old = sorted(set(self.state.versions) - {self.state.live})
        what = self.draw.choice(("push", "push", "promote", "delete") if old else ("push",))
        if what == "push":
            folder = self.draw.choice(self.folders)
            self.hoped = self.state.pushed(self.digests[folder])
            response = client.post("/v1/adapters", **upload(folder, self.name))
        elif what == "promote":
            version = self.draw.choice(old)
            self.hoped = self.state.promoted(version)
            response = client.post(f"/v1/adapters/{self.name}/promote", json={"version": version})
        else:
            version = self.draw.choice(old)
            self.hoped = self.state.without(version)
            response = client.delete(f"/v1/adapters/{self.name}/versions/{version}")
        if not response.is_success:
            self.refused.append(f"{what} of {self.name}: {response.status_code} {response.text}")
        self.state, self.hoped = self.hoped, None
        self.acknowledged += 1

    def check(self, client: httpx.Client) -> None:
        """What is there now is what was acknowledged, or that and the change that was under way."""
        response = client.get(f"/v1/adapters/{self.name}")
        found: tuple[int | None, dict[int, str]] = (None, {})
        if response.status_code != 404:
            body = response.json()
            found = body["live"], {version["version"]: version["digest"] for version in body["versions"]}
        if self.hoped is not None and found == self.hoped.seen() != self.state.seen():
            self.state = self.hoped
        assert found == self.state.seen(), f"{self.name}: {found}, acknowledged {self.state}, under way {self.hoped}"
        self.hoped = None


@pytest.mark.timeout(60 + 15 * KILLS)
def test_a_kill_at_any_moment_loses_nothing_acknowledged_and_leaves_nothing_half(zygote, tmp_path, make_adapter):
    folders = [make_adapter(seed) for seed in range(5)]
    server = zygote.start()
    pushed = [zygote.client.post("/v1/adapters", **upload(folder, "probe")).json()["digest"] for folder in folders]
    zygote.client.delete("/v1/adapters/probe")
    digests = dict(zip(folders, pushed, strict=True))
    writers = [Writer(name, folders, digests, seed) for seed, name in enumerate(NAMES)]
    draw = random.Random(0)
    torn = 0
    for _ in range(KILLS):
        threads = [threading.Thread(target=writer.work, args=(zygote.client,)) for writer in writers]
        for thread in threads:
            thread.start()
        time.sleep(draw.uniform(0.02, 1.0))
        zygote.kill(server)
        for thread in threads:
            thread.join()
        torn += sum(writer.hoped is not None for writer in writers)
        server = zygote.start()
        for writer in writers:
            assert not writer.refused
            writer.check(zygote.client)
        kept = {digest for writer in writers for digest in writer.state.versions.values()}
        assert {path.name for path in (tmp_path / "data/blobs").iterdir()} == kept
        assert not list((tmp_path / "data/quarantine").iterdir())
    zygote.kill(server)
    assert torn >= KILLS, "few changes were under way when the server was killed, so this proves little"
    assert sum(writer.acknowledged for writer in writers) >= KILLS
    print(f"{KILLS} kills, {torn} changes torn, {sum(writer.acknowledged for writer in writers)} acknowledged")
