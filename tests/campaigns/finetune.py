"""A fine-tuning job over kills of its server and its process, and what clients notice of it.

    python -m tests.campaigns.finetune learn                     200 examples, and answers to held-out ones
    python -m tests.campaigns.finetune kills [MOMENTS] [SEED] [here|workers] [EPOCHS]
                                                                 the same bytes as undisturbed, after so many kills,
                                                                 pauses and cancelled neighbours
    python -m tests.campaigns.finetune beside [SECONDS] [ROUNDS] tokens of 8 streams, with and without a job in turns

Each starts the real server with the embedded model, and trains on its own machine, or with `workers` by `loradock
finetune worker`, which is killed too. `learn` takes some minutes, `kills` 30, `beside` 2 minutes for each round of 60
seconds.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from tests.campaigns.long_prompts import _stream
from tests.support.server import BASE, ROOT, SMALL, Server, done, environment, free_port
from tests.support.waiting import eventually

JOBS = "/v1/fine_tuning/jobs"
ENDED = ("succeeded", "failed", "cancelled")
STREAMS, WARM, WANTED = 8, 5.0, 1.3
# Between two moments, in seconds; a checkpoint is at most 15 seconds old.
BETWEEN = (2.0, 30.0)
# After so many moments without a new step the next one waits for a step: a job is given up after 8 starts without one.
FRUITLESS = 4
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
    page = done(server.http.get(f"{JOBS}/{id}/events", params={"limit": 100}))["data"]
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


def training(folder: Path) -> list[int]:
    """The processes that train below this folder, by their commands: the program, and what it starts for its step."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
        except OSError:
            continue
        if b"\0optimize." in command and f"{folder}/".encode() in command:
            found.append(int(entry.name))
    return sorted(found)


class Site:
    """A server, and its worker where that trains: what is killed here is started again, and goes on over its folder."""

    def __init__(self, folder: Path, where: str, epochs: int) -> None:
        self.folder, self.where, self.epochs, self.port = folder, where, epochs, free_port()
        # Of the process that trains.
        self.place = folder / ("box" if where == "workers" else "data")
        self.worker: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Site:
        self.start()
        try:
            self.start_worker()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.server.__exit__()
        self.kill_worker()

    def start(self) -> None:
        options = (*SMALL, "--finetune-on", self.where)
        self.server = Server(self.folder / "data", self.folder / "log", *options, port=self.port).__enter__()

    def start_worker(self) -> None:
        if self.where == "workers":
            command = [sys.executable, "-m", "serve.cli", "finetune", "worker", "--server", self.server.url]
            with (self.folder / "worker.log").open("ab") as log:
                self.worker = subprocess.Popen(
                    [*command, "--folder", str(self.place)], cwd=ROOT, env=environment(), stdout=log, stderr=log
                )

    def kill_worker(self) -> None:
        if self.worker is not None:
            self.worker.kill()
            self.worker.wait()

    def trains(self, wanted: bool) -> None:
        """Wait until a process trains, or none does."""
        assert eventually(lambda: bool(training(self.place)) == wanted, HOUR), f"it trains: {not wanted}"

    def begun(self, name: str) -> str:
        return begun(self.server, name, n_epochs=self.epochs)

    # What befalls a job

    def server_killed(self, id: str, draw: random.Random) -> None:
        self.server.process.kill()
        self.server.process.wait()
        if self.where == "here":
            self.trains(False)
        self.server.__exit__()
        self.start()

    def trainer_killed(self, id: str, draw: random.Random) -> None:
        if processes := training(self.place):
            with suppress(ProcessLookupError):
                os.kill(draw.choice(processes), signal.SIGKILL)

    def worker_killed(self, id: str, draw: random.Random) -> None:
        self.kill_worker()
        self.trains(False)
        self.start_worker()

    def paused(self, id: str, draw: random.Random) -> None:
        """And resumed after a while, in which the server may be killed."""
        if self.asked(id, "pause"):
            time.sleep(draw.uniform(0.0, 10.0))
            if draw.random() < 0.3:
                self.server_killed(id, draw)
            assert self.asked(id, "resume")

    def neighbour_cancelled(self, id: str, draw: random.Random) -> None:
        """While the job is paused another one trains, and is cancelled at a random moment: nothing of it stays."""
        if not self.asked(id, "pause"):
            return
        other = self.begun("cancelled")
        time.sleep(draw.uniform(*BETWEEN))
        assert self.asked(other, "cancel") and self.asked(id, "resume")
        assert job_of(self.server, other)["status"] == "cancelled"
        assert self.server.http.get("/v1/adapters/cancelled").status_code == 404

    def asked(self, id: str, verb: str) -> bool:
        """Whether it is so; a job at its end, or almost, goes on as it was."""
        answer = self.server.http.post(f"{JOBS}/{id}/{verb}")
        if answer.status_code != 409:
            done(answer)
        return answer.is_success


def kills(folder: Path, count: int = 20, seed: int = 1, where: str = "here", epochs: int = 6) -> None:
    draw, told = random.Random(seed), Counter[str]()
    with Site(folder, where, epochs) as site:
        kinds = [site.server_killed, site.trainer_killed, site.paused, site.neighbour_cancelled]
        kinds += [site.worker_killed] if where == "workers" else []
        undisturbed = digest(site.server, ended(site.server, site.begun("calm"))["fine_tuned_model"])
        id = site.begun("killed")
        fruitless = step = 0
        for moment in range(1, count + 1):
            time.sleep(draw.uniform(*BETWEEN))
            if job_of(site.server, id)["status"] in ENDED:
                break
            before, step = step, steps(site.server, id)
            fruitless = 0 if step > before else fruitless + 1
            if fruitless >= FRUITLESS:
                assert eventually(lambda step=step: steps(site.server, id) > step, HOUR), job_of(site.server, id)
                fruitless = 0
            befalls = draw.choice(kinds)
            told[befalls.__name__] += 1
            print(f"{moment}: {befalls.__name__}, after {steps(site.server, id)} steps", flush=True)
            befalls(id, draw)
        checked(site, id, ended(site.server, id), undisturbed)
    print(f"{dict(told)}: the job ended once, with the same bytes")


def checked(site: Site, id: str, job: dict[str, Any], undisturbed: str) -> None:
    server = site.server
    events = done(server.http.get(f"{JOBS}/{id}/events", params={"limit": 100}))["data"]
    said = [event["message"] for event in events]
    trained = [message for message in said if message.startswith("Step ")]
    assert said.count("The job has successfully completed") == 1 and len(set(trained)) == len(trained)
    versions = server.adapter("killed")["versions"]
    assert len({version["digest"] for version in versions}) == len(versions) <= 3
    assert digest(server, job["fine_tuned_model"]) == undisturbed
    every = done(server.http.get(JOBS))["data"]
    assert {other["status"] for other in every if other["id"] != id} <= {"succeeded", "cancelled"}
    for folder in (site.folder / "data" / "finetuning", *([site.place / "jobs"] if site.worker else [])):
        assert eventually(lambda folder=folder: not list(folder.iterdir()), 400), list(folder.iterdir())
    assert not training(site.folder)


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
                assert eventually(lambda busy=busy: bool(training(server.data)) == busy, 60)
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
        "kills": (kills, (int, int, str, int)),
        "beside": (beside, (float, int)),
    }
    run, types = kinds[what]
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), *(kind(value) for kind, value in zip(types, arguments, strict=False)))


if __name__ == "__main__":
    main(*sys.argv[1:])
