"""What watching costs in throughput: one real server under 16 streams, whose watching goes on and off in short spells.

    python -m tests.campaigns.cost [--minutes M] [--spell SECONDS]

Everything is on, as in `tests.campaigns.watch_cost`. The streams never pause: spells follow one another as on, off,
off, on, and off, on, on, off, so that what grows or fades over the time cancels out. Of each spell the first seconds
are left out, until the requests that began before have ended. Prints the tokens a second that watching costs, in
percent with a 95 % interval over the groups of four spells (Student's t, of the logarithms), and CPU time a request.
A group during which other processes took more than OTHERS of a processor is left out. With the defaults it takes less
than 8 minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from transformers import AutoTokenizer

from serve.asgi.exchange import Exchange, Generation
from serve.config import Config, load
from serve.engine.engine import Lease
from serve.server.launch import resolved
from serve.telemetry.personal_data import KINDS
from serve.telemetry.prices import Price
from tests.support.cpu_clocks import cpu_seconds, since
from tests.support.event_lines import async_event_lines
from tests.support.in_process_server import in_process, run
from tests.support.server import SMALL, free_port

STREAMS, TOKENS = 16, 64
# So many requests fill every reference and bag: an empty one costs less to look up.
FILLING = 2600
# Of each request, as the engine reports it.
LOGPROBS = 0.05
# Shares of a processor.
OTHERS = 0.1
# On, off, off, on, and the other way round.
GROUP = ((True, False, False, True), (False, True, True, False))
VOCABULARY = 4000


def everything(config: Config) -> Config:
    """All that watches is on."""
    return replace(
        config, capture=True, capture_text=True, capture_redact=(r"\d{16}",), personal_data=KINDS,
        drift_logprobs=LOGPROBS, prices=(Price(prompt=1.0, generated=2.0, engine_hour=1.0),),
    )  # fmt: skip


class Words:
    """The frequent words of a model's vocabulary, as frequent as in any language (Zipf): prompts of a few words alone
    would share their first ones, and look as if they changed with time."""

    def __init__(self, model: str, seed: int = 0) -> None:
        tokens = json.loads((Path(model) / "tokenizer.json").read_bytes())["model"]["vocab"]
        words = [token[1:] for token in sorted(tokens, key=tokens.__getitem__) if token[0] == "\u0120"]
        self._words = [word for word in words if word.isalpha() and word.islower() and len(word) > 2][:VOCABULARY]
        self._weights = np.cumsum([1 / (rank + 3) for rank in range(len(self._words))]).tolist()
        self.lots = random.Random(seed)

    def text(self, count: int) -> str:
        return " ".join(self.lots.choices(self._words, cum_weights=self._weights, k=count))


@dataclass(frozen=True, slots=True)
class Spell:
    """What was measured while watching was on, or off: from and until when, and CPU seconds."""

    on: bool
    began: float
    ended: float
    used: dict[str, float]
    others: float


async def main(minutes: float, spell: float) -> None:
    port = free_port()
    with tempfile.TemporaryDirectory() as data:
        config = everything(resolved(load(["--port", str(port), "--data-dir", data, *SMALL], {})))
        async with in_process(config, port) as parts:
            while not parts.exchange_worker.running:  # it reads the model's embedding table first
                await asyncio.sleep(0.1)
            await asyncio.to_thread(fill, parts.exchange_worker, parts.drift_monitor, config.model)
            measured = Measured(parts, f"http://127.0.0.1:{port}/v1/chat/completions", Path(data) / "tokens.npy")
            report(*await measured.spells(60 * minutes, spell, config.model))
            (watched,) = parts.drift_monitor.report("smollm2")
            compared = {kind: signal["samples"] for kind, signal in watched["signals"].items()}
            print(f"compared, {FILLING} of them beforehand: {compared}; thinning: {watched['thinning']}")


class Measured:
    """parts: of the server. url: of its answers. times: the file in which the client leaves when its tokens came."""

    def __init__(self, parts: Any, url: str, times: Path) -> None:
        self._worker, self._inference = parts.exchange_worker, parts.inference
        self._forwarder = self._inference.intake.forwarder
        self._url, self._times = url, times
        self._kept = self._inference._take, self._forwarder._wants_logprobs, Lease.watched

    def watching(self, on: bool) -> None:
        take, wants, watched = self._kept
        Lease.watched = watched if on else nothing  # type: ignore[method-assign, assignment]
        self._inference._take = take if on else lambda exchange: None
        self._forwarder._wants_logprobs = wants if on else lambda adapter: False

    async def spells(self, seconds: float, spell: float, model: str) -> tuple[list[Spell], list[float]]:
        """The spells in which watching went on and off, and when tokens came, by one clock."""
        command = [sys.executable, "-m", "tests.campaigns.cost", "--client", self._url, model, str(self._times)]
        client = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.PIPE)
        await asyncio.sleep(15)  # the engine's first steps
        spells, until = [], time.monotonic() + seconds
        for group in cycle(GROUP):
            if time.monotonic() + 4 * spell > until:
                break
            for on in group:
                self.watching(on)
                # A request takes some seconds; then only those are there that began in this spell.
                await asyncio.sleep(spell / 3)
                spells.append(await self._spell(on, spell * 2 / 3))
        await client.communicate(b"\n")
        return spells, np.load(self._times).tolist()

    async def _spell(self, on: bool, seconds: float) -> Spell:
        busy, used, began = all_seconds(), cpu_seconds(), time.monotonic()
        await asyncio.sleep(seconds)
        ours, ended = since(used), time.monotonic()
        others = all_seconds() - busy - ours["process"] - ours.get("children", 0.0)
        return Spell(on, began, ended, ours, others / (ended - began))


def all_seconds() -> float:
    """CPU seconds of the whole machine."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - times.iowait - getattr(times, "guest", 0) - getattr(times, "guest_nice", 0)


def report(spells: list[Spell], times: list[float]) -> None:
    came = np.array(times)
    logs, used, requests = [], {True: [], False: []}, {True: 0.0, False: 0.0}
    groups = [spells[i : i + 4] for i in range(0, len(spells) - 3, 4)]
    for number, group in enumerate(groups):
        rates: dict[bool, list[float]] = {True: [], False: []}
        for spell in group:
            tokens = np.count_nonzero((came >= spell.began) & (came < spell.ended))
            rates[spell.on].append(tokens / (spell.ended - spell.began))
            used[spell.on].append(spell.used)
            requests[spell.on] += tokens / TOKENS
        others = statistics.mean(spell.others for spell in group)
        on, off = (statistics.mean(rates[side]) for side in (True, False))
        kept = others <= OTHERS
        print(
            f"group {number}: {on:.1f} tokens/s watched, {off:.1f} not; others took {others:.0%} of a processor", end=""
        )
        print("" if kept else ": left out")
        if kept:
            logs.append(math.log(on / off))
    print(f"{len(spells)} spells, {len(logs)} of {len(groups)} groups counted")
    if len(logs) >= 2:
        mean, half = interval(logs)
        cost, least, most = (100 * (1 - math.exp(value)) for value in (mean, mean + half, mean - half))
        print(f"watching costs {cost:.2f} % of the tokens a second (95 % interval {least:.2f} to {most:.2f} %)")
    for name in sorted(used[True][0] if used[True] else ()):
        watched, not_watched = (
            1e6 * sum(each.get(name, 0.0) for each in used[side]) / max(requests[side], 1) for side in (True, False)
        )
        print(f"{name}: {watched - not_watched:.0f} us of CPU a request for watching, of {watched:.0f}")


def interval(values: list[float]) -> tuple[float, float]:
    """The mean of at least two values, and half of its 95 % interval."""
    n = len(values)
    quantile = np.quantile(np.random.default_rng(0).standard_t(n - 1, 1_000_000), 0.975)
    return statistics.mean(values), float(quantile) * statistics.stdev(values) / n**0.5


@contextmanager
def nothing(self: Any, watch: Any) -> Iterator[None]:
    """In place of what lets the backend see the request's Watch."""
    yield


def fill(worker: Any, monitor: Any, model: str) -> None:
    """Requests that no engine answered, until every detector holds as much as it ever does.

    In the real ones' chat template: thinning learns from the first what all have in common, and would leave the real
    ones out as near-duplicates of one another.
    """
    from vllm.sampling_params import SamplingParams

    from serve.vllm_backend.output_processor import parameters_of

    tokenizer, words = AutoTokenizer.from_pretrained(model), Words(model)
    # As the client asks, so that its answers are compared with these.
    parameters = parameters_of(SamplingParams(max_tokens=TOKENS, temperature=1.0, ignore_eos=True))
    for number in range(FILLING):
        messages = [{"role": "user", "content": words.text(12)}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        said = tokenizer(text, add_special_tokens=False).input_ids
        made = Generation(
            said, [words.lots.randrange(500, 40_000) for _ in range(TOKENS)], "length", "a text",
            parameters=parameters,
        )  # fmt: skip
        if number % 4 == 0:
            made = replace(made, logprobs=[-words.lots.random() for _ in range(TOKENS)])
        asker = f"filling {number}".encode()
        worker.offer(Exchange("smollm2", "base", 200, 0.1, 1.0, asker=asker, generations=(made,)))
        if number % 500 == 0:
            worker.settle()
    worker.settle()
    (watched,) = monitor._versions.values()
    assert all(signal.samples for signal in watched.baseline.signals.values())


async def client(url: str, model: str, times: str) -> None:
    """16 streams until a line comes on standard input; then the times at which tokens came are written."""
    words, came, over = Words(model, seed=1), list[float](), asyncio.Event()

    async with httpx.AsyncClient(timeout=300) as http:

        async def stream() -> None:
            while not over.is_set():
                messages = [{"role": "user", "content": words.text(12)}]
                body = {"model": "smollm2", "messages": messages, "max_tokens": TOKENS, "temperature": 1.0}
                body |= {"ignore_eos": True, "stream": True, "user": str(words.lots.random())}
                async with http.stream("POST", url, json=body) as answer:
                    async for line in async_event_lines(answer):
                        if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["delta"]:
                            came.append(time.monotonic())

        async def ended() -> None:
            await asyncio.to_thread(sys.stdin.readline)
            over.set()

        await asyncio.gather(ended(), *(stream() for _ in range(STREAMS)))
    np.save(times, np.array(came))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--client"]:
        asyncio.run(client(*sys.argv[2:]))
    else:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--minutes", type=float, default=6.0, help="of spells; the start takes one or two more")
        parser.add_argument("--spell", type=float, default=9.0, help="seconds of a spell, a third of them left out")
        asked = parser.parse_args()
        run(main(asked.minutes, asked.spell))
