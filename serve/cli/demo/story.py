"""What happens in the demo, one step after another, told in sentences."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from serve.cli.demo.traffic import STREAMS, Traffic, answer
from serve.client.adapter_client import AdapterClient
from serve.errors import LoradockError

FOLDER = Path(__file__).parent
NAME = "demo-support"
GOOD, BAD = 1, 2
SHARE = 0.5
QUESTION = "My kettle has not arrived yet. I ordered it two weeks ago."
# Requests of v1 before the canary begins, and at most of each step that waits for a verdict.
FIRST, MOST = 60, 1500
# A reference above it is not filled in a demo.
REFERENCE = 200
LOOK_SECONDS, STEP_SECONDS = 1.0, 600.0


class StepFailed(LoradockError):
    """A step of the demo did not come to its end."""


@dataclass(slots=True)
class Story:
    """`run` plays it all; `say` prints a sentence, `wait` waits some seconds."""

    client: AdapterClient
    http: httpx.Client
    traffic: Traffic
    say: Callable[[str], None]
    wait: Callable[[float], None] = time.sleep
    # Holds the two adapters, `good` and `bad`.
    folder: Path = FOLDER

    def run(self, base: str) -> None:
        self.push_the_good_version(base)
        with self.traffic:
            self.let_it_work()
            self.try_the_bad_version()
            self.change_the_language()
        if self.traffic.failed:
            self.say(f"{self.traffic.failed} of the demo's requests failed.")

    def push_the_good_version(self, base: str) -> None:
        self.client.push(NAME, self.folder / "good", promote=False, why="the demo's good version")
        self.client.promote(NAME, GOOD, why="the demo's good version")
        self.say(f"Pushed {NAME}@v1, an adapter of {_size(self.folder / 'good')}, and promoted it: it is live now.")
        self.say(f"A customer writes: {QUESTION}")
        for model, label in ((base, "the base model"), (NAME, "v1")):
            self.say(f"  {label} answers: {_one_line(answer(self.http, model, QUESTION))}")

    def let_it_work(self) -> None:
        self.say(f"{STREAMS} customers at a time ask {NAME} now.")
        self._until("v1 has answered", lambda: self.traffic.answered >= FIRST)
        self.say(f"{self.traffic.answered} requests are answered.")

    def try_the_bad_version(self) -> None:
        self.client.push(NAME, self.folder / "bad", promote=False, why="the demo's bad version")
        self.client.canary(NAME, BAD, SHARE, why="the demo tries it out")
        self.say(f"Pushed {NAME}@v2, trained on where four answers in ten refuse to help. Nobody tells the server.")
        self.say(f"v2 is a canary now: {SHARE:.0%} of the customers get it, the others v1, and both are compared.")
        before = self.traffic.answered
        self._until("the canary is called worse", lambda: self.client.show(NAME).get("canary") is None)
        self.say(f"After {self.traffic.answered - before} requests to both: {self._why_it_ended()}")
        self.say("The server took v2 back by itself. v1 answers everybody.")

    def change_the_language(self) -> None:
        needed = self._signal().get("reference_needed", 0)
        if needed > REFERENCE:
            self.say(f"Drift is left out: this server learns from its first {needed:,} requests what is usual.")
            return
        self._until("drift has its reference", lambda: self._signal().get("phase") == "watching")
        self.say("The server knows now what customers usually write. From here on they write German.")
        answered = self.traffic.answered
        self.traffic.speak_german()
        self._until("drift is found", lambda: bool(self._drifted()))
        self.say(f"After {self.traffic.answered - answered} German requests, drift: {self._drifted()}")
        self.say("Drift rolls nothing back: v1 is as good as before, the questions are others.")

    def _until(self, what: str, done: Callable[[], bool]) -> None:
        """Look now and then; StepFailed after so many requests or seconds."""
        first, deadline = self.traffic.answered, time.monotonic() + STEP_SECONDS
        while not done():
            if self.traffic.answered - first > MOST or time.monotonic() > deadline:
                raise StepFailed(f"{what}: not within {self.traffic.answered - first} requests; see the dashboard")
            self.wait(LOOK_SECONDS)

    def _why_it_ended(self) -> str:
        """What the server wrote into the adapter's history."""
        entry: dict[str, Any] = next(
            (row for row in reversed(self.client.show(NAME)["history"]) if row["what"] == "canary_end"), {}
        )
        return verdict(entry.get("why") or "")

    def _live(self) -> dict[str, Any]:
        reports = self.client.drift(NAME).get("versions", [])
        return next((report for report in reports if report["version"] == f"v{GOOD}"), {})

    def _signal(self) -> dict[str, Any]:
        signal: dict[str, Any] = self._live().get("signals", {}).get("prompt", {})
        return signal

    def _drifted(self) -> str:
        return str(self._live().get("alarms", {}).get("prompt", {}).get("text", ""))


def verdict(why: str) -> str:
    """A canary's end in the history, as a sentence."""
    found = re.fullmatch(r"(\w+): (\{.*\})", why, re.DOTALL)
    try:
        evidence = json.loads(found[2]) if found else None
    except ValueError:
        evidence = None
    if not isinstance(evidence, dict):
        return f"the canary ended: {why or 'nobody said why'}."
    checks = evidence.get("checks") or [{}]
    strongest = max(checks, key=lambda row: row.get("log_evidence") or 0.0)
    name = str(strongest.get("check", found[1] if found else "it")).replace("_", " ")
    canary, live = (f"v{evidence.get(key)}" for key in ("canary", "live"))
    return f"{canary} is worse than {live} by its {name}, seen in {strongest.get('canary_requests')} of its answers."


def _size(folder: Path) -> str:
    return f"{sum(file.stat().st_size for file in folder.iterdir()) / 1e6:.1f} MB"


def _one_line(text: str | None) -> str:
    return "(no answer)" if text is None else " ".join(text.split())[:160]
