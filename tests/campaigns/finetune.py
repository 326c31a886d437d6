"""A fine-tuning job over kills of its server and its process, and what clients notice of it.

    python -m tests.campaigns.finetune learn                     200 examples, and answers to held-out ones
    python -m tests.campaigns.finetune kills [KILLS] [SEED]      the same bytes as undisturbed, after so many kills
    python -m tests.campaigns.finetune beside [SECONDS] [ROUNDS] tokens of 8 streams, with and without a job in turns

Each starts the real server with the embedded model, and trains on its own machine. `learn` takes some minutes, `kills`
20, `beside` 2 minutes for each round of 60 seconds.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from tests.campaigns.long_prompts import _stream
from tests.support.server import BASE, SMALL, Server, done, eventually

JOBS = "/v1/fine_tuning/jobs"
ENDED = ("succeeded", "failed", "cancelled")
STREAMS, WARM, WANTED = 8, 5.0, 1.3
# Between two kills, in seconds; a checkpoint is at most 15 seconds old.
BETWEEN = (2.0, 30.0)
HOUR = 3600.0
SYLLABLES = ("ka", "lo", "mi", "ne", "ru", "sa", "to", "vi", "ze", "bo")


def words(count: int, seed: int) -> list[str]:
    """Words that nobody has heard of, each once."""
    every = ["".join(parts) for parts in itertools.product(SYLLABLES, repeat=3)]
    return random.Random(seed).sample(every, count)


def question(word: str) -> str:
    return f"Tag the word {word}."


def answer(word: str) -> str:
    return f"<tag>{word}</tag>"


def examples(count: int) -> bytes:
    rows = [
        {"messages": [{"role": "user", "content": question(word)}, {"role": "assistant", "content": answer(word)}]}
        for word in words(count + 40, 1)[:count]
    ]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def begun(server: Server, name: str, count: int = 200, **hyperparameters: Any) -> str:
    """The id of a job over so many examples."""
    sent = {"data": {"purpose": "fine-tune"}, "files": {"file": ("train.jsonl", examples(count))}}
    file = done(server.http.post("/v1/files", **sent))["id"]
    method = {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}
    asked = {"model": BASE, "training_file": file, "suffix": name, "seed": 1, "method": method}
    return str(done(server.http.post(JOBS, json=asked))["id"])


def job_of(server: Server, id: str) -> dict[str, Any]:
    return done(server.http.get(f"{JOBS}/{id}"))


def ended(server: Server, id: str) -> dict[str, Any]:
    """The job, which must have succeeded."""
    assert eventually(lambda: job_of(server, id)["status"] in ENDED, HOUR), job_of(server, id)
    job = job_of(server, id)
    assert job["status"] == "succeeded", job["error"]
    return job


def digest(server: Server, model: str) -> str:
    name, _, version = model.partition("@v")
    return str(server.adapter(name)["versions"][int(version) - 1]["digest"])


def steps(server: Server, id: str) -> int:
    """How many steps its events tell of."""
    page = done(server.http.get(f"{JOBS}/{id}/events", params={"limit": 1}))["data"]
    return max((event["data"]["step"] for event in page if event["data"]), default=0)


def right(server: Server, model: str) -> float:
    """The share of held-out words that a model tags."""
    held_out = words(240, 1)[200:]
    return sum(server.ask(model, question(word), tokens=24).text.strip() == answer(word) for word in held_out) / 40


def learn(folder: Path) -> None:
    with Server(folder / "data", folder / "log", *SMALL) as server:
        before, began = right(server, BASE), time.monotonic()
        job = ended(server, begun(server, "tags"))
        seconds = time.monotonic() - began
        after = right(server, job["fine_tuned_model"])
    print(f"trained in {seconds:.0f} s ({job['trained_tokens']} tokens): {before:.0%} before, {after:.0%} after")
    assert before < 0.2 and after >= 0.9


def training(server: Server) -> int | None:
    """The process that trains, by its command."""
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
        except OSError:
            continue
        if b"tune" in command and str(server.data).encode() in b"\0".join(command) and b"optimize.cli" in command:
            return int(entry.name)
    return None


def kills(folder: Path, count: int = 20, seed: int = 1) -> None:
    lots, data, log = random.Random(seed), folder / "data", folder / "log"
    with Server(data, log, *SMALL) as server:
        undisturbed = digest(server, ended(server, begun(server, "calm", n_epochs=6))["fine_tuned_model"])
    id, killed = "", 0
    while True:
        with Server(data, log, *SMALL) as server:
            id = id or begun(server, "killed", n_epochs=6)
            while killed < count and job_of(server, id)["status"] not in ENDED:
                time.sleep(lots.uniform(*BETWEEN))
                killed += 1
                process = training(server)
                if process is None or lots.random() < 0.4:
                    print(f"kill {killed}: the server, {steps(server, id)} steps", flush=True)
                    server.process.kill()
                    server.process.wait()
                    break
                print(f"kill {killed}: the training process, {steps(server, id)} steps", flush=True)
                os.kill(process, signal.SIGKILL)
            else:
                job = ended(server, id)
                checked(server, id, job, undisturbed)
                print(f"{killed} kills: the job ended once, with the same bytes")
                return


def checked(server: Server, id: str, job: dict[str, Any], undisturbed: str) -> None:
    events = done(server.http.get(f"{JOBS}/{id}/events", params={"limit": 100}))["data"]
    ends = [event for event in events if event["message"] == "The job has successfully completed"]
    versions = server.adapter("killed")["versions"]
    assert len(ends) == 1 and len({version["digest"] for version in versions}) == len(versions) <= 3
    assert digest(server, job["fine_tuned_model"]) == undisturbed


async def gaps(url: str, seconds: float, seed: int) -> list[float]:
    """Seconds between tokens of streams that answer without a pause."""
    found: list[float] = []
    begins = time.monotonic() + WARM
    ends = begins + seconds
    async with httpx.AsyncClient(base_url=url, timeout=600) as http:

        async def answered(number: int) -> None:
            count = itertools.count()
            while time.monotonic() < ends:
                times = await _stream(http, f"Story {seed}.{number}.{next(count)}: once upon a time", 96)
                pairs = itertools.pairwise(times)
                found.extend(now - before for before, now in pairs if begins <= before < ends)

        await asyncio.gather(*(answered(number) for number in range(STREAMS)))
    return found


def beside(folder: Path, seconds: float = 60.0, rounds: int = 4) -> None:
    alone: list[float] = []
    both: list[float] = []
    trained = 0
    with Server(folder / "data", folder / "log", *SMALL) as server:
        id = begun(server, "tags", n_epochs=50, batch_size=4)
        assert eventually(lambda: steps(server, id) > 0, HOUR)
        for turn in range(rounds):
            for busy in (False, True) if turn % 2 else (True, False):
                verb = "resume" if busy else "pause"
                if (job_of(server, id)["status"] == "paused") == busy:
                    done(server.http.post(f"{JOBS}/{id}/{verb}"))
                assert eventually(lambda busy=busy: (training(server) is not None) == busy, 60)
                before = steps(server, id)
                time.sleep(20 if busy else 1)  # its imports are no part of it
                found = asyncio.run(gaps(server.url, seconds, turn))
                (both if busy else alone).extend(found)
                trained += steps(server, id) - before if busy else 0
        done(server.http.post(f"{JOBS}/{id}/cancel"))
    p = {name: np.percentile(found, (50, 99)) * 1000 for name, found in (("alone", alone), ("beside a job", both))}
    for name, (median, p99) in p.items():
        print(f"{STREAMS} streams {name}: median {median:.1f} ms, p99 {p99:.1f} ms between tokens")
    ratio = p["beside a job"][1] / p["alone"][1]
    print(
        f"p99 is {ratio:.2f} times as long ({len(alone)} and {len(both)} gaps); {trained} steps were trained meanwhile"
    )
    assert ratio <= WANTED and trained > 0


def main(what: str, *arguments: str) -> None:
    kinds: dict[str, tuple[Any, tuple[type, ...]]] = {
        "learn": (learn, ()),
        "kills": (kills, (int, int)),
        "beside": (beside, (float, int)),
    }
    run, types = kinds[what]
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), *(kind(value) for kind, value in zip(types, arguments, strict=False)))


if __name__ == "__main__":
    main(*sys.argv[1:])
