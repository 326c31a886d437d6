"""`make real-tasks DIR=...`: models from GGUF files at tasks, through the server as it is installed.

For each file: the programming problems of `code_problems`, answered at temperature 0; a task that the base cannot do,
lines for cron from English, which a fine-tuning job learns from 360 examples and which 100 others judge; a canary of
the adapter with half of its update, and of one with a fifth, whose answers are rated right or wrong; and what
drift says when people who asked for schedules begin to ask for programs.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.campaigns.code_problems import PROBLEMS
from tests.campaigns.cpu_speed import processor
from tests.support.lora import variant
from tests.support.server import ROOT, Server, done
from tests.support.waiting import eventually

NAME = "cron"
TRAIN, HELD_OUT = 360, 100
AT_ONCE = 8
HOUR = 3600.0
# Ratings of a canary, whatever comes of it; requests that a reference takes, as it is installed; and those after which
# a change of subject must have been seen.
RATINGS, REFERENCE, CHANGED = 320, 3000, 400
DAYS = ("Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
JOBS = ("back up the database", "send the newsletter", "rotate the logs", "clear the cache", "renew certificates",
        "water the plants", "post the lunch menu", "sync the calendar", "rebuild the search index", "check for updates",
        "count the visitors", "mail the invoices", "archive old orders", "refresh exchange rates", "wake the printer",
        "defragment the disk", "reset the demo account", "fetch the weather", "remind the team", "purge the trash",
        "scan for viruses", "publish the podcast", "close stale tickets", "measure the temperature", "ping the router",
        "export the ledger", "compress the photos", "retrain the model", "order coffee")  # fmt: skip
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
          "November", "December")  # fmt: skip


def schedules(draw: random.Random) -> Iterator[tuple[str, str]]:
    """English, and the five fields of cron that say the same."""
    while True:
        hour, minute = draw.randrange(24), draw.choice((0, 5, 10, 15, 20, 30, 40, 45, 50))
        half, day, month = "am" if hour < 12 else "pm", draw.randrange(1, 29), draw.randrange(12)
        clock = draw.choice((f"{hour:02}:{minute:02}", f"{(hour - 1) % 12 + 1}:{minute:02} {half}"))
        steps, weekday, every = draw.choice((5, 10, 15, 20, 30)), draw.randrange(7), draw.choice((2, 3, 4, 6, 8, 12))
        english, fields = draw.choice((
            (f"every day at {clock}", f"{minute} {hour} * * *"),
            (f"every {DAYS[weekday]} at {clock}", f"{minute} {hour} * * {weekday}"),
            (f"every {steps} minutes", f"*/{steps} * * * *"),
            (f"every {every} hours", f"0 */{every} * * *"),
            (f"on day {day} of each month at {clock}", f"{minute} {hour} {day} * *"),
            (f"on weekdays at {clock}", f"{minute} {hour} * * 1-5"),
            (f"on {MONTHS[month]} {day} at {clock}", f"{minute} {hour} {day} {month + 1} *"),
        ))  # fmt: skip
        english = f"{draw.choice(JOBS)} {english}"
        yield f"Write the cron schedule, its five fields and nothing else: {english}", fields


def none_twice(rows: Iterator[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    seen = set()
    for row in rows:
        if row not in seen:
            seen.add(row)
            yield row


def asked(server: Server, model: str, question: str, tokens: int, **more: Any) -> tuple[str, str, str]:
    """The answer, who gave it, and the request's id."""
    body = {"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": tokens, **more}
    answer = server.http.post("/v1/chat/completions", json={"temperature": 0, **body}, timeout=600)
    said = done(answer)
    return said["choices"][0]["message"]["content"], said["model"], answer.headers["x-request-id"]


def solved(server: Server, model: str) -> list[str]:
    """The problems that its answers do not solve."""

    def wrong(at: int) -> bool:
        return not PROBLEMS[at].passed(asked(server, model, PROBLEMS[at].prompt, 320)[0])

    with ThreadPoolExecutor(AT_ONCE) as pool:
        failed = [*pool.map(wrong, range(len(PROBLEMS)))]
    return [problem.head for problem, is_wrong in zip(PROBLEMS, failed, strict=True) if is_wrong]


def programs(draw: random.Random) -> Iterator[str]:
    """What people ask for who want programs; none twice."""
    wants = [f"{verb} {what}" for verb in ("counts", "sorts", "reverses", "merges", "sums up", "prints")
             for what in ("the words of a text", "a list of numbers", "the rows of a CSV file", "the keys of a dict",
                          "a linked list", "the lines of a log file", "nested lists")]  # fmt: skip
    kinds = ("Write a Python function that {}", "How do I write a class that {}?", "Give me a short script that {}",
             "Fix my code, please: it {} and crashes", "Write a unit test for a function that {}",
             "I need a generator that {}", "Write it without imports: code that {}", "Is there a one-liner that {}?",
             "Refactor a method that {}", "Explain, with code, what {}")  # fmt: skip
    every = [kind.format(want) for want in wants for kind in kinds]
    draw.shuffle(every)
    yield from every


def is_right(said: str, fields: str) -> bool:
    return said.strip().strip("`").strip() == fields


def right(server: Server, model: str, rows: list[tuple[str, str]]) -> int:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return sum(pool.map(lambda row: is_right(asked(server, model, row[0], 24)[0], row[1]), rows))


def learned(server: Server, base: str, train: list[tuple[str, str]]) -> dict[str, Any]:
    """The job, at its end."""
    lines = [
        json.dumps({"messages": [{"role": "user", "content": asks}, {"role": "assistant", "content": says}]})
        for asks, says in train
    ]
    files = {"file": ("train.jsonl", "\n".join(lines).encode())}
    file = done(server.http.post("/v1/files", data={"purpose": "fine-tune"}, files=files))["id"]
    method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 8}}}
    body = {"model": base, "training_file": file, "suffix": NAME, "seed": 1, "method": method}
    where = f"/v1/fine_tuning/jobs/{done(server.http.post('/v1/fine_tuning/jobs', json=body))['id']}"
    ended = ("succeeded", "failed", "cancelled")
    assert eventually(lambda: done(server.http.get(where))["status"] in ended, HOUR)
    return done(server.http.get(where))


def canary(server: Server, version: int, rows: list[tuple[str, str]]) -> str:
    """What became of a version that gets half of the requests, each of which is rated by whether it was right."""
    done(server.http.post(f"/v1/adapters/{NAME}/canary", json={"version": version, "weight": 0.5}))

    def rate(at: int) -> None:
        asks, fields = rows[at % len(rows)]
        said, _, id = asked(server, NAME, asks, 24, user=f"u{at}")
        done(server.http.post("/v1/feedback", json={"request_id": id, "rating": float(is_right(said, fields))}))

    with ThreadPoolExecutor(AT_ONCE) as pool:
        for first in range(0, RATINGS, 40):
            list(pool.map(rate, range(first, first + 40)))
            time.sleep(1.0)  # answers are compared in groups
            adapter = server.adapter(NAME)
            if adapter["canary"] is None:
                last = adapter["history"][0] if adapter.get("history") else {}
                return f"ended after {first + 40} ratings: {last.get('reason') or last.get('action') or 'taken back'}"
    done(server.http.post(f"/v1/adapters/{NAME}/canary", json={"version": version, "weight": 0}))
    return f"still there after {RATINGS} ratings"


def drift(server: Server, before: list[str], since: list[str]) -> str:
    """After how many requests for programs the adapter's drift is told, when all before were for schedules."""

    def alarms() -> list[dict[str, Any]]:
        return [row for row in server.adapter(NAME)["history"] if row["what"] == "drift"]

    def ask(at: int) -> None:
        asked(server, NAME, before[at], 8, user=f"d{at}")

    def ask_for_programs(at: int) -> None:
        asked(server, NAME, since[at], 8, user=f"p{at}")

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(ask, range(len(before))))
        if found := alarms():
            return f"told before anything changed: {found}"
        for first in range(0, CHANGED, 20):
            list(pool.map(ask_for_programs, range(first, first + 20)))
            time.sleep(1.0)
            if found := alarms():
                return f"told after {first + 20} requests: {'; '.join(str(row['why']) for row in found)}"
    return f"not told after {CHANGED} requests"


def subjects() -> tuple[list[str], list[str]]:
    """What is asked for a reference, and then. Independent draws: schedules of which none came twice would be others at
    the end than at the beginning, as their kinds run out one after another."""
    rows, every = schedules(random.Random(7)), programs(random.Random(6))
    return [next(rows)[0] for _ in range(REFERENCE)], [next(every) for _ in range(CHANGED)]


def pulled(server: Server, folder: Path) -> Path:
    command = [sys.executable, "-m", "serve.cli", "adapters", "pull", f"{NAME}@v1", str(folder), "--url", server.url]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return folder


def measured(file: Path, folder: Path, parts: list[str]) -> None:
    print(f"## {file.name}\n", flush=True)
    rows = none_twice(schedules(random.Random(5)))
    train = [next(rows) for _ in range(TRAIN)]
    held_out = [next(rows) for _ in range(HELD_OUT)]
    with Server(folder / "data", folder / "log", model=str(file)) as server:
        base = str(done(server.http.get("/v1/models"))["data"][0]["id"])
        if "problems" in parts:
            failed = solved(server, base)
            print(f"- problems solved: {len(PROBLEMS) - len(failed)} of {len(PROBLEMS)}; not: {', '.join(failed)}")
        if "task" not in parts:
            return
        print(f"- schedules right: {right(server, base, held_out)} of {HELD_OUT} by the base", flush=True)
        began = time.monotonic()
        job = learned(server, base, train)
        print(
            f"- learned in {time.monotonic() - began:.0f} s: {job['status']}, {job['trained_tokens']} tokens",
            flush=True,
        )
        print(f"- schedules right: {right(server, NAME, held_out)} of {HELD_OUT} by the adapter", flush=True)
        first = pulled(server, folder / "first")
        for what, scale in (("a half", 0.5), ("a fifth", 0.2)):
            pushed = done(server.upload(NAME, variant(first, folder / what, scale=scale), promote=False))
            version = int(pushed["version"])
            scored = right(server, f"{NAME}@v{version}", held_out)
            print(f"- {what} of its update ({scored} right) as canary: {canary(server, version, held_out)}", flush=True)
        print(f"- requests for programs: drift is {drift(server, *subjects())}", flush=True)
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where GGUF files are, or one of them")
    parser.add_argument("--part", action="append", choices=("problems", "task"))
    given = parser.parse_args()
    files = [given.folder] if given.folder.is_file() else sorted(given.folder.glob("*.gguf"))
    if not files:
        raise SystemExit(f"{given.folder} has no GGUF file")
    print(f"{processor()}, {time.strftime('%Y-%m-%d')}\n")
    for file in files:
        with tempfile.TemporaryDirectory() as name:
            measured(file, Path(name), given.part or ["problems", "task"])


if __name__ == "__main__":
    main()
