"""An adapter keeps itself good on the real engine: its task's inputs change, and nobody does anything.

    python -m tests.campaigns.loop [--short] [--canary WEIGHT] [--picture FILE.svg]

An adapter is trained on English questions and answers them. Then the questions are German, with other answers; clients
say what each answer should have been. The server's own loop does the rest: drift, gathering, training, gate, canary,
promote. Printed are the steps with their times, the accuracy of clients' answers before, during and after, failed
requests, and how the new version does on the old task. `--short` has no canary and lower demands.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.campaigns.finetune import ended
from tests.support.server import BASE, SMALL, WATCHED, Server, done
from tests.support.waiting import eventually

NAME, HOUR = "tags", 3600.0
SYLLABLES = ("ka", "lo", "mi", "ne", "ru", "sa", "to", "vi", "ze", "bo", "pu", "di", "ga", "fe", "ho", "ju")
OLD, NEW = "old", "new"
TRAINED, HELD_OUT, WINDOW = 200, 40, 20.0
WANTED, KEPT = 0.9, 0.95
# Seconds before the change and after the promotion that the picture shows.
AROUND = 60.0
# Streams of clients, and the seconds between two requests of a stream. They are gentle while it trains and judges, so
# that the job is not suspended; a canary needs a crowd.
FIRST, CROWD, GENTLE = (4, 0.1), (12, 0.0), (4, 3.0)


def words() -> list[str]:
    """Words that nobody has heard of, each once."""
    every = ["".join(parts) for parts in itertools.product(SYLLABLES, repeat=4)]
    random.Random(7).shuffle(every)
    return every


def question(kind: str, word: str) -> str:
    return f"Tag the word {word}." if kind == OLD else f"Bitte markiere das folgende Wort: {word}"


def answer(kind: str, word: str) -> str:
    return f"<tag>{word}</tag>" if kind == OLD else f"[wort: {word}]"


@dataclass
class Asked:
    """One answer that a client got."""

    when: float
    kind: str
    version: str
    right: bool


@dataclass
class Clients:
    """Ask words that nobody asked before, one after another, and say what each answer should have been."""

    server: Server
    words: list[str]
    kind: str = OLD
    # How many of the streams ask, and the seconds between a stream's requests.
    pace: tuple[int, float] = FIRST
    asked: list[Asked] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Clients:
        for number in range(CROWD[0]):
            thread = threading.Thread(target=self._run, args=(number,))
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, number: int) -> None:
        while not self._stop.wait(self.pace[1]):
            if number >= self.pace[0]:
                self._stop.wait(1.0)
                continue
            kind, word = self.kind, self.words.pop()
            body = {"model": NAME, "messages": [{"role": "user", "content": question(kind, word)}], "max_tokens": 24}
            try:
                response = self.server.http.post(
                    "/v1/chat/completions", json={**body, "temperature": 0, "user": f"someone who likes {word}"}
                )
                response.raise_for_status()
                said = response.json()
                text = str(said["choices"][0]["message"]["content"]).strip()
                right = answer(kind, word)
                self.asked.append(Asked(time.monotonic(), kind, said["model"], text == right))
                told = {"request_id": said["id"], "answer": right}
                self.server.http.post("/v1/feedback", json=told).raise_for_status()
            except Exception as error:  # whatever it is, a client noticed it
                self.failed.append(f"{type(error).__name__}: {error}")

    def share(self, kind: str, version: str | None = None, last: int = 100) -> float:
        """Right answers among the last ones of this kind."""
        found = [one.right for one in self.asked if one.kind == kind and version in (None, one.version)][-last:]
        return sum(found) / max(1, len(found))


def examples(kind: str, some: Sequence[str]) -> bytes:
    rows = [
        {
            "messages": [
                {"role": "user", "content": question(kind, word)},
                {"role": "assistant", "content": answer(kind, word)},
            ]
        }
        for word in some
    ]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def trained(server: Server, some: Sequence[str]) -> str:
    """The version that a fine-tuning job made, which is live."""
    sent = {"data": {"purpose": "fine-tune"}, "files": {"file": ("train.jsonl", examples(OLD, some))}}
    file = done(server.http.post("/v1/files", **sent))["id"]
    asked = {"model": BASE, "training_file": file, "suffix": NAME, "seed": 1}
    return str(ended(server, done(server.http.post("/v1/fine_tuning/jobs", json=asked))["id"])["fine_tuned_model"])


def right(server: Server, model: str, kind: str, some: Sequence[str]) -> float:
    """The share of held-out words that a version answers right."""
    return sum(
        server.ask(model, question(kind, word), tokens=24).text.strip() == answer(kind, word) for word in some
    ) / len(some)


def loop(server: Server) -> dict[str, Any]:
    return done(server.http.get(f"/v1/adapters/{NAME}/loop"))


def policies(short: bool, canary: float) -> dict[str, Any]:
    gate = {"tolerance": 0.2 if short else 0.1, "alpha": 0.05}
    looped = {
        "on": ["drift"], "min_examples": 120 if short else 200, "held_out": 0.3, "budget": 1, "gate": gate,
        "canary": canary, "promote": "auto",
    }  # fmt: skip
    return {NAME: {"train_on_traffic": True, "loop": looped}}


def watched(server: Server, clients: Clients, began: float) -> dict[str, Any]:
    """The first try at its end; its steps are told as they come."""
    seen, told = 0, time.monotonic()
    until = time.monotonic() + HOUR
    while time.monotonic() < until:
        history = done(server.http.get(f"/v1/adapters/{NAME}"))["history"]
        steps = [change["why"] for change in history if change["what"] == "loop"]
        for step in steps[seen:]:
            print(f"{time.monotonic() - began:5.0f} s  {step[:150]}", flush=True)
        seen = len(steps)
        now = loop(server)
        clients.pace = CROWD if now["phase"] == "canary" else FIRST if now["phase"] == "waiting" else GENTLE
        if now["phase"] == "canary" and time.monotonic() - told > 60:
            told = time.monotonic()
            print(f"{told - began:5.0f} s  {compared(server)}", flush=True)
        if now["tries"] and now["tries"][0]["outcome"]:
            return dict(now["tries"][0])
        time.sleep(1)
    raise AssertionError(f"the loop did not end: {loop(server)}")


def main(folder: Path, short: bool, canary: float, picture: Path | None) -> None:
    every = words()
    train, held_out = every[:TRAINED], every[TRAINED : TRAINED + HELD_OUT]
    environ = {"LORADOCK_POLICIES": json.dumps(policies(short, canary))}
    with Server(folder / "data", folder / "log", *SMALL, *WATCHED, **environ) as server:
        version = trained(server, train)
        before = right(server, version, OLD, held_out)
        print(f"{version} answers {before:.0%} of the old task's held-out words", flush=True)
        began = time.monotonic()
        with Clients(server, every[TRAINED + HELD_OUT :]) as clients:
            assert eventually(lambda: gathered(server), 600), "the drift reference is not full"
            time.sleep(AROUND)
            changed = time.monotonic()
            clients.kind = NEW
            attempt = watched(server, clients, changed)
            took = time.monotonic() - changed
            clients.pace = FIRST
            time.sleep(AROUND)
        live = f"{NAME}@v{server.adapter(NAME)['live']}"
        print(f"after it: {loop(server)['note']!r}; open alarms: {json.dumps(alarms(server), indent=1)}")
        old = {model: right(server, model, OLD, held_out) for model in (version, live)}
        new = {model: right(server, model, NEW, held_out) for model in (version, live)}
    print(json.dumps(attempt["gate"], indent=1))
    print(f"the try was {attempt['outcome']} {took:.0f} s after the change: {attempt['text']}")
    ids = {one.version for one in clients.asked}
    print(f"clients: {len(clients.asked)} answers by {len(ids)} versions, {len(clients.failed)} failed requests")
    for task, found in (("old", old), ("new", new)):
        print(f"the {task} task: {found[version]:.0%} by {version}, {found[live]:.0%} by {live}")
    if picture is not None:
        picture.write_text(drawn(clients.asked, began, changed, changed + took))
    assert attempt["outcome"] == "promoted" and live != version, attempt
    assert not clients.failed, clients.failed[:5]
    assert new[live] >= WANTED and new[version] < 0.2 and old[live] >= KEPT * old[version]


def alarms(server: Server) -> dict[str, Any]:
    """Signals of the watched versions that have an open alarm, as the report says them."""
    report = done(server.http.get(f"/v1/adapters/{NAME}/drift"))
    return {
        f"{each['version']} {kind}": signal
        for each in report["versions"]
        for kind, signal in each["signals"].items()
        if signal["alarmed"]
    }


def compared(server: Server) -> str:
    """How far the canary is."""
    report = done(server.http.get(f"/v1/adapters/{NAME}/drift")).get("canary") or {}
    checks = [(row["check"], row["effect"], row["log_evidence"], row["log_proof"]) for row in report.get("checks", ())]
    return f"canary: {report.get('requests')} requests, to proof {report.get('requests_to_proof')}: {checks}"


def gathered(server: Server) -> bool:
    """The live version's reference is full."""
    report = done(server.http.get(f"/v1/adapters/{NAME}/drift"))
    live = f"v{server.adapter(NAME)['live']}"
    mine = [one for one in report["versions"] if one["version"] == live]
    return bool(mine) and mine[0]["signals"]["prompt"]["phase"] == "watching"


def drawn(asked: Sequence[Asked], began: float, changed: float, promoted: float) -> str:
    """The accuracy of clients' answers over time, as SVG."""
    width, height, left, top = 720, 260, 50, 30
    end = max(one.when for one in asked)
    scale = (width - left - 20) / (end - began)

    def x(when: float) -> float:
        return left + (when - began) * scale

    def y(share: float) -> float:
        return top + (1 - share) * (height - top - 40)

    points = []
    for at in range(int((end - began) / WINDOW) + 1):
        here = [one.right for one in asked if at * WINDOW <= one.when - began < (at + 1) * WINDOW]
        if here:
            points.append(f"{x(began + (at + 0.5) * WINDOW):.1f},{y(sum(here) / len(here)):.1f}")
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for share in (0.0, 0.5, 1.0):
        lines.append(f'<line x1="{left}" x2="{width - 20}" y1="{y(share)}" y2="{y(share)}" stroke="#ddd"/>')
        lines.append(f'<text x="{left - 8}" y="{y(share) + 4}" text-anchor="end">{share:.0%}</text>')
    for when, text, side in ((changed, "the questions change", "start"), (promoted, "promoted", "end")):
        lines.append(f'<line x1="{x(when):.1f}" x2="{x(when):.1f}" y1="{top}" y2="{y(0)}" stroke="#c60"/>')
        lines.append(f'<text x="{x(when):.1f}" y="{top - 8}" fill="#c60" text-anchor="{side}">{text}</text>')
    lines.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="#06c" stroke-width="2"/>')
    said = f"right answers of clients, in windows of {WINDOW:g} s, over {(end - began) / 60:.0f} minutes"
    lines.append(f'<text x="{left}" y="{height - 12}">{said}</text>')
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--canary", type=float, default=None)
    parser.add_argument("--picture", type=Path)
    given = parser.parse_args()
    weight = given.canary if given.canary is not None else 0.0 if given.short else 0.5
    with tempfile.TemporaryDirectory() as place:
        main(Path(place), given.short, weight, given.picture)
