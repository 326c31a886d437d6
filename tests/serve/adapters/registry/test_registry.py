"""Names, versions and pointers: what was acknowledged is true, and stays true."""

from __future__ import annotations

import json
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from serve.adapters.registry.registry import Registry
from serve.errors import BadRequest, Conflict, NotFound
from tests.support.postgres import database
from tests.support.registry import FOUND, digest, on_sqlite, push


@pytest.fixture
def registry(url: str):
    with Registry(url) as registry:
        yield registry


def test_the_first_upload_is_version_one_and_live(registry):
    adapter, created = registry.add("pirate", FOUND, digest(1), by="ana")
    assert created and adapter.tag == "pirate@v1"
    assert (adapter.rank, adapter.base, adapter.target_modules, adapter.nbytes) == (
        8,
        "toy",
        ("k_proj", "q_proj"),
        1234,
    )
    assert abs(adapter.created - time.time()) < 60
    assert registry.live("pirate") == registry.get("pirate", 1) == registry.resolve("pirate") == adapter


def test_an_unloaded_name_has_no_live_version_and_all_that_it_had_before(registry, url):
    for number in (1, 2):
        push(registry, "pirate", number)
    assert registry.unload("pirate", by="bo", why="idle").version == 2
    assert registry.live("pirate") is None and [version.version for version in registry.versions("pirate")] == [1, 2]
    with pytest.raises(NotFound):
        registry.resolve("pirate")
    with pytest.raises(NotFound):
        registry.unload("pirate", by="bo")
    with Registry(url) as again:
        assert (again.live("pirate"), again.before("pirate")) == (None, 2)
    assert registry.rollback("pirate", by="bo").version == 2
    assert registry.rollback("pirate", by="bo").version == 1
    rows = [(row["what"], row["from_version"], row["to_version"]) for row in registry.history("pirate")][4:]
    assert rows == [("unload", 2, None), ("rollback", None, 2), ("rollback", 2, 1)]


def test_what_comes_back_after_an_unload_is_not_what_was_before_it(registry):
    for number in (1, 2):
        push(registry, "pirate", number)
    registry.unload("pirate", by="bo")
    registry.promote("pirate", 2, by="bo")
    assert registry.before("pirate") == 1
    registry.unload("pirate", by="bo")
    registry.promote("pirate", 1, by="bo")
    assert registry.before("pirate") == 2
    with pytest.raises(Conflict):
        registry.unload("pirate", by="bo", expected=2)
    registry.share("pirate", "canary", 2, 0.5, by="bo")
    registry.unload("pirate", by="bo", expected=1)
    assert registry.canary("pirate") is None


def test_the_same_bytes_are_the_same_version(registry):
    push(registry, "pirate", 1)
    before = registry.generation
    adapter, created = registry.add("pirate", FOUND, digest(1), by="ana")
    assert not created and adapter.version == 1
    assert registry.generation == before


def test_old_bytes_pushed_again_become_live_if_asked(registry):
    push(registry, "pirate", 1), push(registry, "pirate", 2)
    assert registry.add("pirate", FOUND, digest(1), by="ana", promote=False)[1] is False
    assert registry.live("pirate").version == 2
    push(registry, "pirate", 1)
    assert registry.live("pirate").version == 1


def test_the_same_bytes_may_have_two_names(registry):
    push(registry, "a", 1), push(registry, "b", 1)
    registry.delete("a", by="ana")
    assert registry.digests() == {digest(1)}


def test_a_version_that_is_not_promoted_waits(registry):
    push(registry, "pirate", 1, promote=False)
    assert registry.live("pirate") is None
    assert registry.resolve("pirate@v1").version == 1
    with pytest.raises(NotFound):
        registry.resolve("pirate")


def test_a_public_name_is_a_name_a_version_or_a_digest(registry):
    push(registry, "pirate", 1), push(registry, "pirate", 2)
    assert registry.resolve("pirate").version == 2
    assert registry.resolve("pirate@v1").version == 1
    assert registry.resolve(f"pirate@{digest(1)[:12]}").version == 1


@pytest.mark.parametrize(
    "public",
    [
        "",
        "nobody",
        "pirate@v3",
        "pirate@v0",
        "pirate@v01",
        "pirate@1",
        "pirate@",
        "@v1",
        "pirate@v1@v1",
        "pirate@v1\n",
        "Pirate",
        "pirate@" + "0" * 12,
        "pirate@" + "0" * 11,
        "pirate@v99999999999999999999",
        "�",
        "x" * 10000,
    ],
)
def test_any_other_name_is_not_found_and_nothing_answers_instead(registry, public):
    push(registry, "pirate", 1)
    with pytest.raises(NotFound) as caught:
        registry.resolve(public)
    assert caught.value.code == "model_not_found"
    assert len(caught.value.message.encode()) < 1000


def test_rollback_walks_back_through_what_was_live(registry):
    for number in (1, 2, 3):
        push(registry, "pirate", number)
    assert registry.rollback("pirate", by="bo").version == 2
    assert registry.rollback("pirate", by="bo").version == 1
    with pytest.raises(Conflict, match="no earlier version"):
        registry.rollback("pirate", by="bo")
    assert registry.promote("pirate", 3, by="bo").version == 3
    assert registry.rollback("pirate", by="bo").version == 1


def test_where_a_rollback_would_lead_is_known_before(registry):
    assert registry.before("pirate") is None
    for number in range(3):
        push(registry, "pirate", number)
    registry.promote("pirate", 1, by="bo")
    assert registry.before("pirate") == registry.rollback("pirate", by="bo").version == 3
    assert registry.before("pirate") == registry.rollback("pirate", by="bo").version == 2
    assert registry.before("pirate") == 1


def test_rollback_skips_what_was_never_live(registry):
    push(registry, "pirate", 1), push(registry, "pirate", 2, promote=False), push(registry, "pirate", 3)
    assert registry.rollback("pirate", by="bo").version == 1


def test_rollback_skips_what_was_deleted(registry):
    for number in (1, 2, 3):
        push(registry, "pirate", number)
    registry.delete("pirate", 2, by="bo")
    assert registry.rollback("pirate", by="bo").version == 1


def test_rollback_never_goes_to_where_it_is(registry):
    push(registry, "pirate", 1), push(registry, "pirate", 2)
    registry.promote("pirate", 1, by="bo")
    registry.delete("pirate", 2, by="bo")
    with pytest.raises(Conflict):
        registry.rollback("pirate", by="bo")


def test_whoever_was_slower_is_told(registry):
    push(registry, "pirate", 1), push(registry, "pirate", 2)
    registry.promote("pirate", 1, by="bo", expected=2)
    for change in (
        lambda: registry.promote("pirate", 2, by="cy", expected=2),
        lambda: registry.rollback("pirate", by="cy", expected=2),
        lambda: registry.delete("pirate", by="cy", expected=2),
        lambda: push(registry, "pirate", 3, expected=2),
    ):
        with pytest.raises(Conflict, match="v1 of pirate is live and not v2"):
            change()
    assert registry.live("pirate").version == 1 and len(registry.versions("pirate")) == 2


def test_expecting_zero_means_that_nothing_is_live(registry):
    assert push(registry, "pirate", 1, expected=0) == 1
    with pytest.raises(Conflict):
        push(registry, "pirate", 2, expected=0)


def test_a_live_version_goes_by_force_only(registry):
    push(registry, "pirate", 1), push(registry, "pirate", 2)
    with pytest.raises(Conflict, match="force"):
        registry.delete("pirate", 2, by="bo")
    assert [adapter.version for adapter in registry.delete("pirate", 2, by="bo", force=True)] == [2]
    assert registry.live("pirate").version == 1


def test_force_leaves_nothing_live_where_nothing_was_live_before(registry):
    push(registry, "pirate", 1, promote=False), push(registry, "pirate", 2)
    registry.delete("pirate", 2, by="bo", force=True)
    assert registry.live("pirate") is None
    assert registry.promote("pirate", 1, by="bo") == registry.live("pirate")


def test_the_last_version_takes_its_name_along(registry):
    push(registry, "pirate", 1)
    registry.delete("pirate", 1, by="bo")
    assert registry.names() == [] and registry.digests() == set()
    for gone in (
        lambda: registry.versions("pirate"),
        lambda: registry.get("pirate", 1),
        lambda: registry.promote("pirate", 1, by="bo"),
        lambda: registry.rollback("pirate", by="bo"),
        lambda: registry.delete("pirate", by="bo"),
    ):
        with pytest.raises(NotFound):
            gone()


def test_a_version_number_is_never_given_twice(registry, url):
    push(registry, "pirate", 1), push(registry, "pirate", 2)
    registry.delete("pirate", by="bo")
    assert push(registry, "pirate", 1) == 3
    registry.close()
    with Registry(url) as again:
        assert push(again, "pirate", 2) == 4


def test_every_change_says_who_what_and_why(registry):
    push(registry, "pirate", 1, why="first"), push(registry, "pirate", 2)
    registry.rollback("pirate", by="bo", why="worse")
    registry.delete("pirate", 1, by="cy", force=True)
    told = [
        (row["who"], row["what"], row["why"], row["from_version"], row["to_version"])
        for row in registry.history("pirate")
    ]
    assert told == [
        ("ana", "add", "first", None, 1),
        ("ana", "promote", "first", None, 1),
        ("ana", "add", "", None, 2),
        ("ana", "promote", "", 1, 2),
        ("bo", "rollback", "worse", 2, 1),
        ("cy", "delete", "", 1, None),
    ]
    assert all(abs(row["when"] - time.time()) < 60 for row in registry.history("pirate"))
    registry.delete("pirate", by="cy")
    assert registry.history("pirate")[-1]["what"] == "delete"
    with pytest.raises(NotFound):
        registry.history("nobody")


def test_a_refused_change_changes_nothing(registry):
    push(registry, "pirate", 1)
    before = (registry.generation, registry.history("pirate"), registry.adapters())
    with pytest.raises(NotFound):
        registry.promote("pirate", 9, by="bo")
    with pytest.raises(NotFound):
        registry.delete("pirate", 9, by="bo")
    with pytest.raises(BadRequest):
        registry.add("../x", FOUND, digest(2), by="bo")
    with pytest.raises(Conflict):
        registry.add("new", FOUND, digest(2), by="bo", expected=7)
    assert before == (registry.generation, registry.history("pirate"), registry.adapters())
    assert registry.names() == ["pirate"]


def test_strange_words_in_who_and_why_are_kept_readable(registry):
    push(registry, "pirate", 1, why="\x00\ud800 because")
    assert registry.history("pirate")[0]["why"].endswith("because")


def test_generation_rises_with_each_change(registry):
    seen = [registry.generation]
    for change in (
        lambda: push(registry, "a", 1),
        lambda: push(registry, "a", 2, promote=False),
        lambda: registry.promote("a", 2, by="bo"),
        lambda: registry.rollback("a", by="bo"),
        lambda: registry.delete("a", by="bo"),
    ):
        change()
        seen.append(registry.generation)
    assert seen == sorted(set(seen))


def test_a_restart_remembers_everything(registry, url):
    for number in (1, 2, 3):
        push(registry, "a", number)
    push(registry, "b", 4, promote=False)
    registry.rollback("a", by="bo")
    told = (registry.generation, registry.adapters(), registry.live("a"), registry.live("b"), registry.history("a"))
    registry.close()
    with Registry(url) as again:
        assert told == (again.generation, again.adapters(), again.live("a"), again.live("b"), again.history("a"))
        assert again.rollback("a", by="bo").version == 1


def test_another_process_is_seen_after_a_refresh(registry, url):
    with Registry(url) as other:
        push(other, "pirate", 1)
        assert registry.names() == []
        assert registry.refresh() and registry.live("pirate").version == 1
        assert not registry.refresh()
        # What another process wrote decides a change also without one.
        push(other, "pirate", 2)
        with pytest.raises(Conflict, match="v2 of pirate is live"):
            registry.promote("pirate", 1, by="bo", expected=1)


def test_reads_do_not_need_the_database(registry):
    push(registry, "pirate", 1)
    registry.close()
    assert registry.resolve("pirate").version == 1


def test_a_registry_in_memory_works_from_every_thread():
    with Registry("sqlite://") as registry, ThreadPoolExecutor(4) as pool:
        versions = list(pool.map(lambda number: push(registry, "pirate", number), range(12)))
        assert sorted(versions) == list(range(1, 13))


def test_history_is_read_while_a_change_is_under_way(registry):
    push(registry, "pirate", 1)
    push(registry, "pirate", 2)
    with ThreadPoolExecutor(1) as pool, registry.transaction():
        assert pool.submit(registry.history, "pirate").result(60)[0]["what"] == "add"
        assert pool.submit(registry.before, "pirate").result(60) == 1
        assert pool.submit(registry.stamp).result(60)


@on_sqlite
def test_the_file_is_private_durable_and_in_wal_mode(registry, url):
    path = url.removeprefix("sqlite:///")
    push(registry, "pirate", 1)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(path + "-wal").st_mode) == 0o600
    with registry._engine.connect() as connection:
        pragmas = [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("journal_mode", "synchronous")]
        assert pragmas == ["wal", 2]
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1


def test_a_name_that_was_deleted_whole_is_born_private_unpinned_and_without_shares(registry):
    push(registry, "pirate", 1, shared=True), push(registry, "pirate", 2)
    registry.pin("pirate", by="me")
    registry.share("pirate", "canary", 1, 0.5, by="me")
    registry.delete("pirate", by="me")
    push(registry, "pirate", 3)
    assert not registry.shared("pirate") and registry.pinned("pirate") is registry.canary("pirate") is None


def test_a_name_belongs_to_a_tenant(registry):
    push(registry, "pirate", 1), push(registry, "acme/pirate", 2), push(registry, "globex/pirate", 1)
    assert [adapter.id for adapter in registry.adapters()] == [
        f"acme/pirate@{digest(2)[:12]}",
        f"globex/pirate@{digest(1)[:12]}",
        f"pirate@{digest(1)[:12]}",
    ]
    assert registry.resolve("acme/pirate@v1").tenant == "acme"
    for wrong in ("default/pirate", "a/b/c", "/pirate", "acme/", "a b/pirate", "../pirate"):
        with pytest.raises(BadRequest):
            push(registry, wrong, 3)


def test_many_writers_and_readers_agree(registry):
    push(registry, "pirate", 0)
    wrong: list[str] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            before = registry.generation
            live = registry.resolve("pirate")
            if registry.get("pirate", live.version) != live or registry.generation < before:
                wrong.append(live.tag)
            time.sleep(0.0005)

    def write(worker: int) -> list[int]:
        made = []
        for step in range(6):
            made.append(push(registry, "pirate", 100 * worker + step + 1))
            registry.promote("pirate", random.randint(1, made[-1]), by=str(worker))
        return made

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    with ThreadPoolExecutor(4) as pool:
        made = [version for versions in pool.map(write, range(4)) for version in versions]
    stop.set()
    for reader in readers:
        reader.join()
    assert sorted(made) == list(range(2, 26)) and not wrong


def test_one_of_two_simultaneous_swaps_wins(registry):
    for number in (1, 2, 3):
        push(registry, "pirate", number)
    start = threading.Barrier(2)

    def swap(version: int) -> bool:
        start.wait()
        try:
            return bool(registry.promote("pirate", version, by="x", expected=3))
        except Conflict:
            return False

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(swap, (1, 2))) == [False, True]


LOOP = """
import sys
from serve.adapters.adapter import Inspection
from serve.adapters.registry.registry import Registry
registry = Registry(sys.argv[1])
n = registry.generation
while True:
    n += 1
    adapter, _ = registry.add("pirate", Inspection(8, None, ("q",), 1, 2), f"{n:064x}", by="loop")
    print(adapter.version, flush=True)
    if adapter.version % 4 == 0:
        registry.delete("pirate", adapter.version - 2, by="loop")
"""


def test_a_kill_loses_nothing_that_was_acknowledged(url):
    promised = 0
    for delay in (0.05, 0.1, 0.17):
        child = subprocess.Popen([sys.executable, "-c", LOOP, url], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        first = child.stdout.readline()
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        rest = child.stdout.read().splitlines()
        child.wait()
        child.stdout.close()
        promised = max([promised, int(first), *map(int, rest)])
        with Registry(url) as registry:
            live = registry.live("pirate")
            assert live is not None and live.version >= promised
            assert live in registry.versions("pirate")
            numbers = [row["to_version"] for row in registry.history("pirate") if row["what"] == "add"]
            assert numbers == list(range(1, live.version + 1))


class Pointers(RuleBasedStateMachine):
    """The registry against the few lines that say what it means."""

    @initialize()
    def open(self) -> None:
        self.registry = Registry("sqlite://")
        self.versions: dict[int, int] = {}
        self.trail: list[int] = []
        self.next = 1

    def teardown(self) -> None:
        self.registry.close()

    def point(self, version: int) -> None:
        if not self.trail or self.trail[-1] != version:
            self.trail.append(version)

    @rule(number=st.integers(0, 6), promote=st.booleans())
    def add(self, number: int, promote: bool) -> None:
        adapter, created = self.registry.add("x", FOUND, digest(number), by="me", promote=promote)
        known = {kept: version for version, kept in self.versions.items()}
        assert created == (number not in known)
        if created:
            known[number] = self.next
            self.versions[self.next] = number
            self.next += 1
        assert adapter.version == known[number]
        if promote:
            self.point(adapter.version)

    @rule(version=st.integers(1, 8))
    def promote(self, version: int) -> None:
        if version in self.versions:
            self.registry.promote("x", version, by="me")
            self.point(version)
        else:
            with pytest.raises(NotFound):
                self.registry.promote("x", version, by="me")

    @rule()
    def rollback(self) -> None:
        if len(self.trail) > 1:
            self.trail.pop()
            assert self.registry.rollback("x", by="me").version == self.trail[-1]
        else:
            with pytest.raises((Conflict, NotFound)):
                self.registry.rollback("x", by="me")

    @rule(version=st.integers(1, 8), force=st.booleans())
    def delete(self, version: int, force: bool) -> None:
        live = self.trail[-1] if self.trail else None
        if version not in self.versions or (version == live and len(self.versions) > 1 and not force):
            with pytest.raises((Conflict, NotFound)):
                self.registry.delete("x", version, by="me", force=force)
            return
        self.registry.delete("x", version, by="me", force=force)
        del self.versions[version]
        rest = [number for number in self.trail if number != version]
        self.trail = [number for at, number in enumerate(rest) if at == 0 or rest[at - 1] != number]

    @invariant()
    def agree(self) -> None:
        if not hasattr(self, "registry"):
            return
        live = self.registry.live("x")
        assert (live.version if live else None) == (self.trail[-1] if self.trail else None)
        assert self.registry.digests() == {digest(number) for number in self.versions.values()}


Pointers.TestCase.settings = settings(
    max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", "25")), stateful_step_count=20, deadline=None
)
test_pointers_mean_what_they_say = Pointers.TestCase


def test_servers_that_start_at_once_over_an_empty_database_all_find_their_tables(postgres):
    for _ in range(5):
        url, start = database(postgres), threading.Barrier(4)

        def opened(url=url, start=start):
            start.wait(60)
            with Registry(url) as registry:
                return registry.generation

        with ThreadPoolExecutor(4) as pool:
            assert [future.result() for future in [pool.submit(opened) for _ in range(4)]] == [0] * 4


def test_current_versions_are_those_that_get_traffic_and_the_newest(registry):
    for number in range(1, 6):
        push(registry, "pirate", number, promote=number == 1)
    registry.share("pirate", "canary", 2, 0.5, by="me")
    registry.share("pirate", "shadow", 3, 0.5, by="me")
    push(registry, "poet", 9)
    current = {(adapter.name, adapter.version) for adapter in registry.current()}
    assert current == {("pirate", 1), ("pirate", 2), ("pirate", 3), ("pirate", 5), ("poet", 1)}


def test_a_long_history_keeps_its_latest_changes_and_the_others_go_to_a_file(registry, tmp_path):
    for name in ("pirate", "tone"):
        push(registry, name, 1)
    for number in range(40):
        registry.tag("pirate", 1, [str(number)], by="anna")
    whole, stamp = registry.history("pirate"), registry.stamp()
    archive = tmp_path / "history.jsonl"
    moved = registry.rotate_history(10, archive)
    assert moved == len(whole) - 10 and registry.history("pirate") == whole[-10:] and registry.history("tone")
    lines = [json.loads(line) for line in archive.read_text().splitlines()]
    assert [(line["what"], line["when"], line["label"]) for line in lines] == [
        (row["what"], row["when"], row["label"]) for row in whole[:-10]
    ]
    assert {line["name"] for line in lines} == {"pirate"} and registry.stamp() == stamp
    assert registry.rotate_history(10, archive) == 0 and stat.S_IMODE(archive.stat().st_mode) == 0o600
