"""`make fleet-size`: four servers on one PostgreSQL registry of 10,000 names with two versions each.

Servers in processes of their own over FakeBackend: what is measured is the registry's part. Counted are what a change
costs each other server (CPU time and statements, less what it spends without changes), answers by the old version
after a change was acknowledged, what lists cost, and the database's connections with thirty servers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import Engine, create_engine, insert, select, text

from serve.adapters.registry.tables import history, names, versions
from tests.support import postgres, tiny
from tests.support.app import upload
from tests.support.counted_server import HEADERS, Counted

SEED = "seed"
# After an acknowledgement no server answers by the old version any more.
BOUND_SECONDS = 0.5
PAGES = (
    "/v1/adapters", "/v1/adapters?limit=1000", "/v1/models", "/metrics", "/v1/overview", "/v1/overview/changes",
    "/v1/adapters/n42",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--names", type=int, default=10_000)
    parser.add_argument("--servers", type=int, default=4)
    parser.add_argument("--changes", type=int, default=200, help="of each kind")
    parser.add_argument("--requests", type=int, default=2_000, help="that are held against what is live")
    parser.add_argument("--many", type=int, default=30, help="servers whose connections are counted; 0: none")
    options = parser.parse_args()
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (work / "model").mkdir()
        tiny.model(work / "model")
        programs = postgres.programs()
        assert programs, "PostgreSQL is not installed"
        place = stack.enter_context(postgres.running(programs))
        database = postgres.database(place)
        engine = create_engine(database)
        stack.callback(engine.dispose)
        servers = started(stack, work, database, engine, options.names, options.servers)
        tell({"names": options.names, "servers": options.servers})
        tell({"pages": pages_cost(servers[0])})
        tell({"a change costs another server": changes_cost(servers, options.changes)})
        tell({"answers": answers(servers, options.requests)})
        for server in servers:
            server.stop()
        if options.many:
            tell({"connections": connections(stack, work, place, options.many)})


def tell(part: dict[str, Any]) -> None:
    print(json.dumps(part, indent=1), flush=True)


def started(stack: ExitStack, work: Path, database: str, engine: Engine, count: int, servers: int) -> list[Counted]:
    """The servers, on a registry of so many names."""

    def start(name: str) -> Counted:
        server = Counted(work, name, database, f"file://{work}/blobs")
        stack.callback(server.kill)
        server.wait_until_ready()
        return server

    first = start("server-0")
    for seed in (0, 1):
        first.http.post("/v1/adapters", **upload(tiny.adapter(work / f"adapter-{seed}", seed), SEED)).raise_for_status()
    first.stop()
    fill(engine, count)
    return [start(f"server-{number}") for number in range(servers)]


def fill(engine: Engine, count: int) -> None:
    """So many names, each with the versions and the history of the one that was pushed."""
    with engine.begin() as connection:
        row = connection.execute(select(names).where(names.c.name == SEED)).mappings().one()
        numbered = connection.execute(select(versions).where(versions.c.name_id == row["id"])).mappings().all()
        told = connection.execute(select(history).where(history.c.name_id == row["id"])).mappings().all()
        first = row["id"] + 1
        ids = range(first, first + count)
        connection.execute(insert(names), [{**row, "id": id, "name": f"n{id - first}"} for id in ids])
        connection.execute(insert(versions), [{**each, "name_id": id} for id in ids for each in numbered])
        rows = [{**each, "name_id": id} for id in ids for each in told]
        connection.execute(insert(history), [{key: row[key] for key in row if key != "id"} for row in rows])
        connection.execute(text(f"SELECT setval('names_id_seq', {first + count})"))


def changes_cost(servers: list[Counted], count: int) -> dict[str, Any]:
    """CPU milliseconds and statements a change, of the servers that did not make it: the worst and the median."""
    one, *others = servers
    pause = 0.02

    def tag(number: int) -> None:
        body = {"tags": [f"tag-{number}"]}
        one.http.put(f"/v1/adapters/n{number}/versions/1/tags", json=body).raise_for_status()

    def promote(number: int) -> None:
        one.promote(f"n{number}", 1)

    costs: dict[str, Any] = {}
    for kind, change in (("tag", tag), ("promote", promote)):
        _all_counts(others)
        began = time.monotonic()
        for number in range(count):
            change(number)
            time.sleep(pause)
        time.sleep(1.0)
        seconds = time.monotonic() - began
        busy = _all_counts(others)
        time.sleep(seconds)
        idle = _all_counts(others)
        pairs = [*zip(busy, idle, strict=True)]
        cpu = [1000 * (more.cpu - less.cpu * more.seconds / less.seconds) / count for more, less in pairs]
        queries = [(more.queries - less.queries * more.seconds / less.seconds) / count for more, less in pairs]
        costs[kind] = {
            "cpu ms": _figures(cpu), "statements": _figures(queries),
            "loop late p99 ms": max(more.late_p99 for more, _ in pairs),
            "idle: cpu ms a second": _figures([1000 * less.cpu / less.seconds for _, less in pairs]),
            "idle: statements a second": _figures([less.queries / less.seconds for _, less in pairs]),
        }  # fmt: skip
    return costs


def answers(servers: list[Counted], count: int) -> dict[str, Any]:
    """Promotes through each server in turn, under clients that ask all: who answers by the old version afterwards."""
    listed = servers[0].http.get(f"/v1/adapters/{SEED}").raise_for_status().json()
    ids = {row["version"]: row["id"] for row in listed["versions"]}
    counts: Counter[str] = Counter()
    # The version that is live, since when, and the one that is about to be.
    state = {"live": listed["live"], "begun": listed["live"], "since": 0.0, "changes": 0}
    stop = threading.Event()

    def ask(number: int) -> None:
        with httpx.Client(headers=HEADERS, timeout=30) as client:
            while not stop.is_set():
                number += 1
                before, asked = dict(state), time.monotonic()
                server = servers[number % len(servers)]
                answer = client.post(f"{server.url}/v1/chat/completions", json={"model": SEED, "messages": []})
                counts["asked"] += 1
                if answer.status_code != 200:
                    counts["failed"] += 1
                elif before["begun"] == before["live"] == state["begun"] and before["changes"] == state["changes"]:
                    counts["held against one version"] += 1
                    if answer.json()["model"] != ids[before["live"]]:
                        counts["old"] += 1
                        counts["old after the bound"] += asked - before["since"] > BOUND_SECONDS

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(servers))]
    _all_counts(servers)
    for thread in threads:
        thread.start()
    while counts["held against one version"] < count:
        state["begun"] = 3 - state["live"]
        servers[int(state["changes"]) % len(servers)].promote(SEED, int(state["begun"]))
        state.update(live=state["begun"], since=time.monotonic(), changes=state["changes"] + 1)
        time.sleep(2 * BOUND_SECONDS)
    stop.set()
    for thread in threads:
        thread.join()
    late = max(each.late_p99 for each in _all_counts(servers))
    return {**counts, "failed": counts["failed"], "old": counts["old"],
            "old after the bound": counts["old after the bound"], "changes": state["changes"],
            "loop late p99 ms": round(late, 1)}  # fmt: skip


def pages_cost(server: Counted) -> dict[str, Any]:
    """CPU seconds of the server for each list, its bytes, and how late its loop was meanwhile."""
    costs = {}
    for path in PAGES:
        server.http.get(path)
        server.counts()
        answer = server.http.get(path, timeout=60)
        counts = server.counts()
        assert answer.status_code == 200, f"{path}: {answer.text[:300]}"
        costs[path] = {
            "cpu s": round(counts.cpu, 3), "bytes": len(answer.content), "loop late max ms": round(counts.late_max, 1),
        }  # fmt: skip
    return costs


def connections(stack: ExitStack, work: Path, place: str, many: int) -> dict[str, Any]:
    """The database's connections while so many servers stand idle, and the most while each is asked and changed."""
    database = postgres.database(place)
    servers: list[Counted] = []
    for number in range(many):
        servers.append(Counted(work, f"many-{number}", database, f"file://{work}/many"))
        stack.callback(servers[-1].kill)
        if number % 4 == 3:
            for server in servers[-4:]:
                server.wait_until_ready()
    for server in servers:
        server.wait_until_ready()
    watched = create_engine(database, pool_size=1, isolation_level="AUTOCOMMIT")
    stack.callback(watched.dispose)
    query = text("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()")

    def count() -> int:
        with watched.connect() as connection:
            return int(connection.scalar(query) or 0) - 1

    time.sleep(3)
    idle = max(count() for _ in range(50))
    push = upload(tiny.adapter(work / "adapter-0", 0), SEED)
    servers[0].http.post("/v1/adapters", **push).raise_for_status()
    statuses: Counter[int] = Counter()

    def ask(server: Counted) -> None:
        for turn in range(10):
            told = [server.http.post("/v1/chat/completions", json={"model": SEED, "messages": []})]
            told.append(server.http.put(f"/v1/adapters/{SEED}/versions/1/tags", json={"tags": [f"{turn}"]}))
            statuses.update(answer.status_code for answer in told)

    threads = [threading.Thread(target=ask, args=(server,)) for server in servers]
    for thread in threads:
        thread.start()
    busy = 0
    while any(thread.is_alive() for thread in threads):
        busy = max(busy, count())
        time.sleep(0.02)
    refused = sum(server.log.count("connection slots") + server.log.count("too many clients") for server in servers)
    return {"servers": many, "idle": idle, "busy": busy, "refused by the database": refused,
            "answers": {str(code): n for code, n in statuses.items()}}  # fmt: skip


def _all_counts(servers: list[Counted]) -> list[Any]:
    return [server.counts() for server in servers]


def _figures(values: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 2), "worst": round(max(values), 2)}


if __name__ == "__main__":
    main()
