"""What an alarm says about real prompts, what accepting a change does, and what the words cost.

    python -m tests.campaigns.alarms MODEL [REQUESTS]

MODEL is a checkpoint folder with tokenizer.json. Short general questions become German quotations, then medical
questions, all at once and for a fifth of the requests. Some minutes on one core.
"""

from __future__ import annotations

import itertools
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from serve.asgi.exchange import Exchange, Generation
from serve.drift.features.embedding import Embedding
from serve.drift.features.features import PROMPT, prompt_row
from serve.drift.monitor import DriftMonitor
from serve.drift.signal import Signal
from serve.drift.watched_version import DriftSettings
from serve.events import DriftAlarm, Events
from serve.models.request_text import RequestText
from tests.support.prompts import pool

NUMBERS = random.Random(11)


def main(model: Path, requests: int) -> None:
    from tokenizers import Tokenizer

    tokenizer, embedding = Tokenizer.from_file(str(model / "tokenizer.json")), Embedding.of(model)
    tokens = {kind: [tokenizer.encode(text).ids for text in pool(kind)] for kind in ("general", "german", "medical")}
    for kind in ("german", "medical"):
        for share in (1.0, 0.2):
            said(model, embedding, tokens["general"], tokens[kind], share, kind)
    rows = {kind: np.array([prompt_row(embedding, ids) for ids in each], np.float32) for kind, each in tokens.items()}
    for how in ("acknowledge", "accept"):
        print(f"{how}: {alarms(rows['general'], rows['german'], how, requests)} alarms in {requests} requests after")
    cost(model, embedding, tokens["general"])


def said(model: Path, embedding: Embedding, before: Sequence, after: Sequence, share: float, kind: str) -> None:
    """One stream of distinct prompts, until the alarm and 200 requests on."""
    with TemporaryDirectory() as folder:
        raised: list = []
        settings = DriftSettings(interval=0.0)
        events = Events()
        events.at_once("campaign", raised.append, DriftAlarm)
        monitor = DriftMonitor(Path(folder), settings, events=events)
        monitor.learn("", embedding, text=RequestText(model))
        for number, prompt in enumerate(stream(before, after, share)):
            monitor.observe(exchange(number, prompt))
            monitor.looked()
            if [alarm for alarm in raised if alarm.signal == PROMPT]:
                break
        (alarm, *_) = [alarm for alarm in raised if alarm.signal == PROMPT] or [None]
        if alarm is None:
            print(f"{kind} {share:.0%}: no alarm")
            return
        print(f"{kind} {share:.0%}: alarm {number - CHANGE} requests after the change: {alarm.moved['text']}")
        for later, prompt in enumerate(stream(before, after, share, skip=number + 1)):
            monitor.observe(exchange(number + 1 + later, prompt))
            monitor.looked()
            if later == 200:
                break
        (report,) = monitor.report("tone")
        print(f"  200 requests later: {report['alarms'][PROMPT]['text']}")


# Requests before the change: the reference is 1,000 of them.
CHANGE = 1400


def stream(before: Sequence, after: Sequence, share: float, skip: int = 0) -> Iterator:
    draw, old, new = random.Random(5), iter(before), iter(after)
    for number in range(CHANGE + 2500):
        changed = number >= CHANGE and draw.random() < share
        prompt = next(new if changed else old, None)
        if prompt is None:
            return
        if number >= skip:
            yield prompt


def exchange(number: int, prompt: Sequence[int]) -> Exchange:
    generation = Generation(prompt, [NUMBERS.randrange(1000) for _ in range(20)], "stop", "a text")
    asker = f"user {number}".encode()
    return Exchange(
        "tone", "v1", 200, 0.1, 0.2, id="tone@1", tenant="default", asker=asker, began=float(number),
        generations=(generation,),
    )  # fmt: skip


def alarms(before: np.ndarray, after: np.ndarray, how: str, requests: int) -> int:
    """Alarms of one signal after a real change that is dealt with `how` 100 requests after each."""
    draw = np.random.default_rng(3)
    signal = Signal(PROMPT)
    for row in before[draw.integers(len(before), size=1400)]:
        signal.update(row)
    first, waited = 0, 0
    for row in after[draw.integers(len(after), size=requests)]:
        signal.update(row)
        waited = waited + 1 if signal.alarmed else 0
        if waited == 100:
            first = first or signal.alarms
            getattr(signal, how)()
    return signal.alarms - first


def cost(model: Path, embedding: Embedding, prompts: Sequence) -> None:
    """CPU time of a request with the words and without them."""
    long = [[*itertools.chain.from_iterable(prompts[i : i + 25])] for i in range(0, 25 * (len(prompts) // 25), 25)]
    for length, few in (("short", prompts[:3000]), ("long", long)):
        for words in (None, RequestText(model)):
            with TemporaryDirectory() as folder:
                monitor = DriftMonitor(Path(folder), DriftSettings(interval=0.0))
                monitor.learn("", embedding, text=words)
                exchanges = [exchange(number, prompt) for number, prompt in enumerate(few)]
                began = time.thread_time()
                for each in exchanges:
                    monitor.observe(each)
                monitor.looked()
                spent = 1e6 * (time.thread_time() - began) / len(few)
                print(f"{length} prompts {'with' if words else 'without'} words: {spent:.0f} us a request")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 20_000)
