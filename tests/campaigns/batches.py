"""A batch survives a kill of its engine and of its server: no line twice, none lost; and what clients notice of it.

    python -m tests.campaigns.batches [LINES] [SECONDS]

Starts the real server and has clients ask it at a steady rate (Poisson), in turns of SECONDS: alone, and beside a batch
of short completions that does not end meanwhile and is cancelled then. Then a batch of LINES runs without clients:
its engine is killed after a third of its lines, the server after two thirds, and the server starts again over the same
data directory. At the end each line must be in the output, exactly once.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from tests.support.crowd import engines
from tests.support.server import BASE, SMALL, Server, done
from tests.support.waiting import eventually

PATH = "/v1/completions"
# What clients ask: an answer of so many tokens, so many times a second.
TOKENS, RATE = 24, 0.8
LINE_TOKENS = 12
# More than are answered beside the clients in a turn, and turns.
MANY, TURNS = 20_000, 3
START = 600.0


def line(number: int) -> str:
    body = {"model": BASE, "prompt": f"Item {number} of the list is", "max_tokens": LINE_TOKENS, "temperature": 0}
    return json.dumps({"custom_id": f"line-{number}", "method": "POST", "url": PATH, "body": body})


def begun(server: Server, lines: int) -> str:
    """The id of a batch of so many lines."""
    data = "\n".join(map(line, range(lines))).encode()
    file = done(server.http.post("/v1/files", data={"purpose": "batch"}, files={"file": ("in.jsonl", data)}))
    asked = {"input_file_id": file["id"], "endpoint": PATH, "completion_window": "24h"}
    batch = done(server.http.post("/v1/batches", json=asked))
    return str(batch["id"])


def batch_of(server: Server, id: str) -> dict[str, Any]:
    return done(server.http.get(f"/v1/batches/{id}"))


def answered(server: Server, id: str) -> int:
    counts = batch_of(server, id)["request_counts"]
    return int(counts["completed"] + counts["failed"])


async def clients(url: str, seconds: float, lots: random.Random) -> list[float]:
    """Seconds that each answer took, of requests that wait for nobody."""
    tasks, end = [], time.monotonic() + seconds

    async def ask(http: httpx.AsyncClient) -> float:
        body = {"model": BASE, "prompt": f"Story {lots.random()}:", "max_tokens": TOKENS, "ignore_eos": True}
        began = time.perf_counter()
        (await http.post(PATH, json=body)).raise_for_status()
        return time.perf_counter() - began

    async with httpx.AsyncClient(base_url=url, timeout=300) as http:
        while time.monotonic() < end:
            tasks.append(asyncio.create_task(ask(http)))
            await asyncio.sleep(lots.expovariate(RATE))
        return await asyncio.gather(*tasks)


def told(name: str, seconds: Sequence[float]) -> float:
    """Say how long answers took; the 99th percentile."""
    p99 = statistics.quantiles(seconds, n=100, method="inclusive")[98]
    print(f"clients {name}: {len(seconds)} answers, median {statistics.median(seconds):.2f} s, p99 {p99:.2f} s",
          flush=True)  # fmt: skip
    return p99


def checked(server: Server, id: str, lines: int) -> None:
    """Each line is in one of the two files, once."""
    batch = batch_of(server, id)
    seen: Counter[str] = Counter()
    for kind in ("output_file_id", "error_file_id"):
        if batch[kind]:
            content = server.http.get(f"/v1/files/{batch[kind]}/content").text
            rows = [json.loads(row) for row in content.split("\n") if row]
            seen.update(row["custom_id"] for row in rows)
            print(f"{kind}: {len(rows)} lines")
    twice = sum(count > 1 for count in seen.values())
    lost = lines - len(seen)
    print(f"{batch['status']}, {batch['request_counts']}: {twice} lines twice, {lost} lost")
    assert (twice, lost, batch["status"], batch["request_counts"]["completed"]) == (0, 0, "completed", lines)


def noticed(server: Server, seconds: float, lots: random.Random) -> None:
    """What clients notice of a batch."""
    asyncio.run(clients(server.url, 10, lots))
    alone: list[float] = []
    beside: list[float] = []
    for _ in range(TURNS):
        alone += (turn := asyncio.run(clients(server.url, seconds, lots)))
        told("alone", turn)
        id = begun(server, MANY)
        assert eventually(lambda id=id: answered(server, id) > 0, START), "no progress"
        before, began = answered(server, id), time.monotonic()
        beside += (turn := asyncio.run(clients(server.url, seconds, lots)))
        told("beside a batch", turn)
        rate = (answered(server, id) - before) / (time.monotonic() - began)
        print(f"{rate:.1f} lines a second meanwhile", flush=True)
        assert batch_of(server, id)["status"] == "in_progress", "the batch ended meanwhile"
        done(server.http.post(f"/v1/batches/{id}/cancel"))
        assert eventually(lambda id=id: batch_of(server, id)["status"] == "cancelled", START)
    ratio = told("beside a batch, all turns", beside) / told("alone, all turns", alone)
    print(f"p99 is {ratio:.2f} times as long", flush=True)


def killed(server: Server, lines: int) -> str:
    """The batch whose engine was killed, and then the server in the middle of it."""
    id = begun(server, lines)
    assert eventually(lambda: answered(server, id) >= lines // 3, START), "no progress"
    print(f"the engine is killed at {answered(server, id)} lines", flush=True)
    for pid in engines(server):
        os.kill(pid, signal.SIGKILL)
    assert eventually(lambda: answered(server, id) >= 2 * lines // 3, START), "no progress after the engine's kill"
    print(f"the server is killed at {answered(server, id)} lines", flush=True)
    server.process.kill()
    server.process.wait()
    return id


def main(lines: int = 1000, seconds: float = 100.0) -> None:
    folder, lots = Path(tempfile.mkdtemp()), random.Random(1)
    data, log = folder / "data", folder / "log"
    with Server(data, log, *SMALL) as server:
        noticed(server, seconds, lots)
        id = killed(server, lines)
    with Server(data, log, *SMALL) as server:
        there = answered(server, id)
        print(f"the server is back, {there} of {lines} lines are answered", flush=True)
        assert there < lines, "the batch had ended before the kill"
        assert eventually(lambda: batch_of(server, id)["status"] == "completed", START), batch_of(server, id)
        checked(server, id, lines)


if __name__ == "__main__":
    main(*(kind(value) for kind, value in zip((int, float), sys.argv[1:], strict=False)))
