"""Streams of prompts in which nothing changed but how they come: how many of them raise an alarm, and which.

    python -m tests.campaigns.drift_streams [--streams 100] [--kinds sessions bursts] [--finished streams.jsonl]
    python -m tests.campaigns.drift_streams --changes | --cost

With `--finished` it goes on where it was stopped (`tests.campaigns.finished_streams`).

Every request goes through `DriftMonitor.observe` and `looked`, behind a chat template, with a second between two of
them where nothing else is said. The kinds:

uniform   independent draws of all questions, for comparison
popular   independent draws of 3,000 questions by Zipf's law, where the longest, the shortest or any are asked most
users     the same of 300 users, who are as unequal and have favourites of their own
days      30 users, who begin at night: 20 seconds between two requests, one in the morning, and so on
topics    a fifth to three fifths of the questions are medical, on a daily wave once over the reference or by an AR(1)
sessions  six questions on one topic by one user, one session after the other or five at a time
bursts    300 near-duplicates in a row, with other numbers and nobody's, three times in the stream
openings  the system prompt changes from 454 to 555 tokens and back, three times, and the questions stay; in a chat
          template, or right behind it, and there from 9 tokens to 12 too
narrow    the requests of an adapter for one task: thirty things, in seven ways to say when
tenants   four system prompts at once, of 55, 25, 10 and 5 % of the requests, and none; or one, of half of the requests

`--changes` counts the requests until a new system prompt together with another language, or another topic, is a drift
of prompts. `--cost` shows the CPU time of the prompt's side of a request.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import math
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from serve.asgi.exchange import Exchange, Generation
from serve.drift import watched_version
from serve.drift.features.embedding import Embedding
from serve.drift.features.features import LOGPROB, OUTPUT, PROMPT
from serve.drift.monitor import DriftMonitor
from serve.drift.watched_version import DriftSettings
from serve.events import DriftAlarm, Events
from serve.models.embedded import ensure
from tests.campaigns.finished_streams import FinishedStreams, add_options, digest, interval, run_chosen
from tests.campaigns.real_tasks import schedules
from tests.support.prompts import pool

POPULAR, SYSTEM = 3000, (454, 555)
BURST = 300
# What a machine sends again and again with other numbers.
FORMS = (
    "Where is order {}? It was shipped on {} with {} items.",
    "Summarize ticket {} of customer {}: priority {}, opened {} days ago, last answer {} hours ago.",
    "Convert {} euros and {} cents to dollars at a rate of {}.",
    "Sensor {} reported {} degrees at {}. Is that too hot for hall {}?",
)
MODULES = ("argparse", "decimal", "difflib", "doctest", "enum", "heapq", "inspect", "pickle", "random", "statistics")
MODULES += ("string", "subprocess", "textwrap", "threading", "typing", "unittest", "zipfile", "logging", "datetime")

# Tokens, who asks, and seconds since the request before, 1 by default.
Request = tuple[list[int], bytes | None] | tuple[list[int], bytes | None, float]


@cache
def tokenizer():
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(ensure("smollm2") / "tokenizer.json"))


@cache
def embedding() -> Embedding:
    return Embedding.of(ensure("smollm2"))


def tokens(text: str) -> list[int]:
    return tokenizer().encode(text, add_special_tokens=False).ids


@cache
def questions(kind: str) -> tuple[list[int], ...]:
    """The tokens of every text of a pool."""
    return tuple(text.ids for text in tokenizer().encode_batch(list(pool(kind)[:12_000]), add_special_tokens=False))


@cache
def vectors(kind: str) -> np.ndarray:
    """(texts, dimensions) of unit length."""
    rows = np.array([embedding().vector(ids) for ids in questions(kind)])
    rows -= rows.mean(axis=0)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@cache
def prose() -> list[int]:
    """English of which system prompts are cut."""
    return tokens("\n".join(inspect.getdoc(importlib.import_module(name)) or "" for name in MODULES))


def system(rng: np.random.Generator, length: int) -> list[int]:
    begin = rng.integers(len(prose()) - length)
    return prose()[begin : begin + length]


def chat(question: Sequence[int], opening: Sequence[int] = ()) -> list[int]:
    """A question in the chat template, behind a system prompt if there is one."""
    before, user, end = _template()
    head = [*before, *opening, *end] if opening else []
    return [*head, *user, *question, *end, *_template_end()]


@cache
def _template() -> tuple[list[int], list[int], list[int]]:
    return tokens("<|im_start|>system\n"), tokens("<|im_start|>user\n"), tokens("<|im_end|>\n")


@cache
def _template_end() -> list[int]:
    return tokens("<|im_start|>assistant\n")


def uniform(rng: np.random.Generator) -> Iterator[Request]:
    texts = questions("general")
    while True:
        yield chat(texts[rng.integers(len(texts))]), None


def popular(rng: np.random.Generator, *, exponent: float, order: str, named: bool = False) -> Iterator[Request]:
    """named: whoever asks the same again is one asker, as the server has it of requests without a user."""
    chosen = [questions("general")[i] for i in rng.choice(len(questions("general")), POPULAR, replace=False)]
    if order != "any":
        chosen.sort(key=len, reverse=order == "longest")
    weights = np.arange(1, POPULAR + 1) ** -exponent
    weights /= weights.sum()
    while True:
        for i in rng.choice(POPULAR, 1000, p=weights):
            yield chat(chosen[i]), b"asker %d" % i if named else None


def users(rng: np.random.Generator, *, exponent: float, count: int = 300) -> Iterator[Request]:
    texts = questions("general")
    weights = np.arange(1, count + 1) ** -exponent
    weights /= weights.sum()
    favourites = rng.choice(len(texts), (count, 50))
    # Whoever asks most asks the longest questions.
    favourites = favourites.ravel()[np.argsort([-len(texts[i]) for i in favourites.ravel()])].reshape(favourites.shape)
    while True:
        user = rng.choice(count, p=weights)
        yield chat(texts[rng.choice(favourites[user])]), b"user %d" % user


def days(rng: np.random.Generator, *, day: int = 4000) -> Iterator[Request]:
    for at, (prompt, user, *_) in enumerate(users(rng, exponent=1.0, count=30)):
        yield prompt, user, 20 ** (0.5 + 0.5 * math.cos(2 * math.pi * at / day))


def topics(rng: np.random.Generator, *, wave: bool, day: int = 1000) -> Iterator[Request]:
    """The share of the medical ones is a sine, or what a normal AR(1) says."""
    both, at, state, phase = (questions("general"), questions("medical")), 0, 0.0, rng.random()
    while True:
        state = 0.5 * state + math.sqrt(0.75) * rng.standard_normal()
        share = 0.4 + 0.2 * math.sin(2 * math.pi * (at / day + phase)) if wave else 1 / (1 + math.exp(0.4 - state))
        texts = both[int(rng.random() < share)]
        yield chat(texts[rng.integers(len(texts))]), None
        at += 1


def sessions(rng: np.random.Generator, *, at_a_time: int, length: int = 6) -> Iterator[Request]:
    texts, rows = questions("general"), vectors("general")
    running: list[tuple[bytes, list[int]]] = []
    number = 0
    while True:
        while len(running) < at_a_time:
            nearby = rng.choice(len(texts), 400, replace=False)
            near = nearby[np.argsort(-(rows[nearby] @ rows[nearby[0]]))[:length]]
            running.append((b"user %d" % number, near.tolist()))
            number += 1
        which = int(rng.integers(len(running)))
        user, rest = running[which]
        yield chat(texts[rest.pop()]), user
        if not rest:
            running.pop(which)


def bursts(rng: np.random.Generator, *, requests: int) -> Iterator[Request]:
    texts = questions("general")
    begins = set((np.array([0.3, 0.55, 0.8]) * requests).astype(int).tolist())
    at = 0
    while True:
        if at in begins:
            form = FORMS[rng.integers(len(FORMS))]
            for _ in range(BURST):
                numbers = (int(10 ** rng.uniform(0, 5)) for _ in range(form.count("{}")))
                yield chat(tokens(form.format(*numbers))), None
            at += BURST
        yield chat(texts[rng.integers(len(texts))]), None
        at += 1


def openings(
    rng: np.random.Generator, *, requests: int, lengths: Sequence[int] = SYSTEM, template: bool = True
) -> Iterator[Request]:
    texts, both = questions("general"), [system(rng, length) for length in lengths]
    at = 0
    while True:
        question, opening = texts[rng.integers(len(texts))], both[4 * at // requests % 2]
        yield chat(question, opening) if template else [*opening, *tokens("\n\n"), *question], None
        at += 1


def tenants(rng: np.random.Generator, *, lengths: Sequence[int], shares: Sequence[float]) -> Iterator[Request]:
    texts, each = questions("general"), [system(rng, length) if length else [] for length in lengths]
    while True:
        opening = each[rng.choice(len(each), p=shares)]
        yield chat(texts[rng.integers(len(texts))], opening), None


def narrow(rng: np.random.Generator) -> Iterator[Request]:
    rows = schedules(random.Random(int(rng.integers(1 << 32))))
    while True:
        yield chat(tokens(next(rows)[0])), None


def streams(requests: int) -> dict[str, Callable[[np.random.Generator], Iterator[Request]]]:
    made: dict[str, Callable[[np.random.Generator], Iterator[Request]]] = {"uniform": uniform}
    for exponent in (0.6, 0.8, 1.0, 1.2):
        for order in ("longest", "shortest", "any"):
            name = f"popular, Zipf {exponent}, {order} first".replace("any first", "any order")
            made[name] = lambda rng, s=exponent, order=order: popular(rng, exponent=s, order=order)
    made["popular, Zipf 1.0, each an asker"] = lambda rng: popular(rng, exponent=1.0, order="longest", named=True)
    made["users, Zipf 1.0"] = lambda rng: users(rng, exponent=1.0)
    made["days of 30 users"] = days
    made["topics on a daily wave"] = lambda rng: topics(rng, wave=True)
    made["topics of an AR(1) 0.5"] = lambda rng: topics(rng, wave=False)
    for at_a_time in (1, 5):
        made[f"sessions of six, {at_a_time} at a time"] = lambda rng, n=at_a_time: sessions(rng, at_a_time=n)
    made["narrow"] = narrow
    made["bursts of 300"] = lambda rng: bursts(rng, requests=requests)
    made["openings 454 - 555"] = lambda rng: openings(rng, requests=requests)
    made["openings, no template"] = partial(openings, requests=requests, template=False)
    made["short openings, no template"] = partial(openings, requests=requests, lengths=(9, 12), template=False)
    made["tenants, five openings"] = lambda rng: tenants(
        rng, lengths=(300, 120, 700, 450, 0), shares=(0.55, 0.25, 0.1, 0.05, 0.05)
    )
    forty = np.linspace(60, 450, 40).astype(int).tolist()
    made["tenants, forty openings"] = lambda rng: tenants(rng, lengths=forty, shares=[1 / 40] * 40)
    made["tenants, half without an opening"] = lambda rng: tenants(rng, lengths=(300, 0), shares=(0.5, 0.5))
    return made


@dataclass(slots=True)
class Watching:
    """A monitor of one version, whose answers do not count."""

    folder: Path
    reference: int = 1000
    alarms: list[tuple[int, str]] = field(default_factory=list)
    sent: int = 0
    now: float = 0.0
    monitor: DriftMonitor = field(init=False)

    def __post_init__(self) -> None:
        settings = DriftSettings(reference=self.reference)
        events = Events()
        events.at_once("campaign", self._alarm, DriftAlarm)
        self.monitor = DriftMonitor(self.folder, settings, events=events)
        # The answers are all the same here: to rank them too would take twice as long.
        self.monitor._needed |= {OUTPUT: 10**9, LOGPROB: 10**9}
        self.monitor.learn("", embedding())

    def _alarm(self, alarm) -> None:
        self.alarms.append((self.sent, alarm.signal))

    def send(self, request: Request) -> None:
        self.sent += 1
        prompt, asker, *since = request
        self.now += since[0] if since else 1.0
        generation = Generation(prompt, [1, 2], "stop")
        self.monitor.observe(
            Exchange(
                "tone",
                "v1",
                200,
                0.1,
                0.2,
                id="tone@1",
                asker=asker,
                began=self.now,
                generations=(generation,),
            )
        )
        self.monitor.looked()

    def report(self) -> dict:
        return self.monitor.report("tone")[0]


# Alarms that say what such a stream does.
SAID = {
    "bursts of 300": {"sampling"},
    "openings 454 - 555": {"opening"},
    "openings, no template": {"opening"},
    "short openings, no template": {"opening"},
    "days of 30 users": {"sampling"},
}


def stream(name: str, seed: int, *, requests: int = 20_000, reference: int = 1000) -> dict[str, Any]:
    """What one stream of a kind raises: the request of each alarm, evidence, and how much was compared."""
    # The answers are all the same here: to look at them too would take a fifth longer.
    no_answers = patch.object(watched_version, "answer_rows", lambda embedding, answer: {})
    with tempfile.TemporaryDirectory() as folder, no_answers:
        watching = Watching(Path(folder), reference)
        source = streams(requests)[name](np.random.default_rng(seed))
        for _ in range(requests):
            watching.send(next(source))
        report = watching.report()
    prompts = report["signals"][PROMPT]
    return {
        "requests": requests,
        "alarms": watching.alarms,
        "false": any(signal not in SAID.get(name, ()) for _, signal in watching.alarms),
        "evidence": bool(prompts["log_evidence"] >= prompts["log_threshold"] or prompts["alarmed"]),
        "accepted": report["thinning"]["accepted"] / sum(report["thinning"].values()),
        "compared": prompts["samples"],
        "structure": {key: prompts["structure"].get(key) for key in ("block", "wandering_scores")},
    }


def table(finished: FinishedStreams, names: Iterable[str]) -> Iterator[str]:
    """A line for each kind, and one for all."""
    yield "| stream | streams | with an alarm of | false | at most (95 %) | evidence | accepted | compared | CPU |"
    yield "|---" * 9 + "|"
    kinds = {name: lines for name in names if (lines := finished.of(name))}
    kinds |= {"all": [line for lines in kinds.values() for line in lines]} if len(kinds) > 1 else {}
    for name, lines in kinds.items():
        alarmed = Counter(signal for line in lines for signal in {signal for _, signal in line["alarms"]})
        said = ", ".join(f"`{signal}` {times}" for signal, times in sorted(alarmed.items())) or "none"
        false, evidence = (sum(line[what] for line in lines) for what in ("false", "evidence"))
        most = interval(false, len(lines))[1]
        accepted, compared, cpu = (
            np.median([line[what] for line in lines]) for what in ("accepted", "compared", "cpu")
        )
        yield (
            f"| {name} | {len(lines)} | {said} | {false} | {most:.1%} | {evidence} "
            f"| {accepted:.0%} | {compared:,.0f} | {cpu:.1f} s |"
        )


def changes(count: int, seed: int) -> Iterator[str]:
    """Requests from a new system prompt with other prompts behind it to each alarm."""
    for kind in ("german", "medical"):
        delays: dict[str, list[float]] = {PROMPT: [], "opening": []}
        for number in range(seed, seed + count):
            rng = np.random.default_rng(number)
            first, second = (system(rng, length) for length in SYSTEM)
            with tempfile.TemporaryDirectory() as folder:
                watching = Watching(Path(folder))
                for _ in range(1500 + rng.integers(500)):
                    watching.send((chat(questions("general")[rng.integers(len(questions("general")))], first), None))
                before = watching.sent
                while watching.sent < before + 400:
                    watching.send((chat(questions(kind)[rng.integers(len(questions(kind)))], second), None))
                for signal, values in delays.items():
                    later = [at - before for at, alarmed in watching.alarms if alarmed == signal and at > before]
                    values.append(later[0] if later else np.inf)
        for signal, values in delays.items():
            within = sum(value <= 60 for value in values)
            delay = f"{np.median(values):.0f} | {max(values):.0f} | {within} of {count}"
            yield f"| {kind} and a new system prompt: {signal} | {delay} |"


def cost(rounds: int = 400) -> Iterator[str]:
    """CPU time a request of the prompt's side: thinning, what prompts share, and the row."""
    from serve.drift.features.features import prompt_row
    from serve.drift.thinning import WINDOW, Thinning

    for length in (20, 100, 500, 2000, 8000):
        rng = np.random.default_rng(length)
        head = rng.integers(0, 49_000, length // 2).tolist()
        prompts = [[*head, *rng.integers(0, 49_000, length - length // 2).tolist()] for _ in range(rounds)]
        thinning: Thinning = Thinning(warm_up=WINDOW, numbers=embedding().numbers)
        times = []
        for i, prompt in enumerate(prompts):
            start = time.process_time_ns()
            taken = thinning.offer(i, tokens=prompt, now=float(i), key=i)
            if taken is not None:
                prompt_row(embedding(), taken.own)
            times.append(time.process_time_ns() - start)
        held = sum(value.nbytes for value in thinning.state().values())
        yield f"{length} tokens: {np.median(times[100:]) / 1000:.0f} us a request; remembers {held >> 10} KiB"


def main() -> None:
    options = argparse.ArgumentParser(description="streams in which nothing changed")
    add_options(options, streams=100)
    options.add_argument("--requests", type=int, default=20_000)
    options.add_argument("--kinds", nargs="*", default=[], help="beginnings of names; all by default")
    options.add_argument("--changes", action="store_true")
    options.add_argument("--cost", action="store_true")
    chosen = options.parse_args()
    if chosen.cost or chosen.changes:
        for line in cost() if chosen.cost else changes(chosen.streams, chosen.seed):
            print(line, flush=True)
        return
    questions("general"), embedding()  # fetched before there are several processes
    code = digest("serve/drift", "tests/campaigns/drift_streams.py", requests=chosen.requests)
    finished = FinishedStreams(chosen.finished, code)
    names = [name for name in streams(0) if not chosen.kinds or name.startswith(tuple(chosen.kinds))]
    work = partial(stream, requests=chosen.requests)
    run_chosen(finished, names, work, chosen)
    print(*table(finished, names), sep="\n")


if __name__ == "__main__":
    main()
