"""How often `auto` is right over adapters that are asked real prompts, and what it takes of the processor.

    python -m tests.campaigns.auto [--held-out 300] [--reference 1000] [--near]

Real routes, registry, policies and drift over a stand-in for the engine, with SmolLM2's tokenizer. Each adapter is
asked by name, by a different user each time, until it has a reference. Then prompts of its task that it has not had
are asked of `auto`, and prompts of tasks that no adapter has; the answer's header says what was chosen. The base is
asked by name too: of all of those tasks (`--base all`), of every other one (`half`: the others are new to everybody),
or of none (`none`: it has no reference). `--near` adds three adapters whose tasks are near the others': health beside
medical and general questions, news beside stories, an encyclopedia beside all.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import save_file

from serve.config import Config, load
from serve.gateway.request import InferenceRequest
from serve.models.embedded import ensure
from serve.rollout.policy import parse
from tests.support import tiny
from tests.support.app import CHAT, Started, upload
from tests.support.backend import FakeBackend
from tests.support.prompts import Unreachable, pool

TASKS = ("general", "medical", "finance", "code", "german", "rulings", "stories", "manuals")
NEAR = ("health", "news", "encyclopedia")
ELSEWHERE = ("quotations", "italian", "spanish", "policies", "biographies", "abstracts", "jargon", "computing")
# Requests besides the reference: until thinning has settled, and those that it leaves out.
MORE = 400


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def settings(folder: Path, tasks: list[str], reference: int) -> Config:
    """Of a tiny model with SmolLM2's tokenizer."""
    model = folder / "model"
    model.mkdir()
    tiny.model(model)
    shutil.copyfile(ensure("smollm2") / "tokenizer.json", model / "tokenizer.json")
    save_file({"model.embed_tokens.weight": torch.randn(49_152, tiny.HIDDEN)}, model / "model.safetensors")
    config = load([str(model), "--name", "base", "--data-dir", str(folder / "data")], {})
    return replace(config, drift_reference=reference, policies=parse({task: {"auto": True} for task in tasks}))


def parts_of(client: httpx.AsyncClient) -> Any:
    """Of the server that the client asks."""
    transport: Any = client._transport
    return transport.app.state.parts


async def refer(client: httpx.AsyncClient, model: str, texts: tuple[str, ...]) -> int:
    """Ask a model by name until its reference is complete; how many requests that took."""
    parts = parts_of(client)
    live = parts.registry.live(model) if model in parts.registry else None
    for number, text in enumerate(texts, 1):
        answer = await client.post(CHAT, json={"model": model, "messages": said(text), "user": f"u{number}"})
        answer.raise_for_status()
        if number % 100 == 0:
            await asyncio.to_thread(parts.exchange_worker.settle)
            if parts.drift_monitor.fits.of(live.id if live else model):
                return number
    raise RuntimeError(f"{model} has no reference after {len(texts)} requests")


def mixed(kinds: list[str], reference: int) -> tuple[str, ...]:
    """What the base is asked by name, of each kind as much; none that is asked later."""
    each = [pool(kind)[-(reference + MORE) // len(kinds) :] for kind in kinds]
    return tuple(text for texts in zip(*each, strict=False) for text in texts)


async def asked(client: httpx.AsyncClient, texts: tuple[str, ...]) -> Counter[tuple[str, str]]:
    """What was chosen for each, and why."""
    told: Counter[tuple[str, str]] = Counter()
    for text in texts:
        answer = await client.post(CHAT, json={"model": "auto", "messages": said(text)})
        answer.raise_for_status()
        name, reason, *_ = answer.headers["x-loradock-auto"].split("; ")
        told[name, reason.removeprefix("reason=")] += 1
    return told


def cost(client: httpx.AsyncClient, texts: list[str]) -> tuple[float, float]:
    """Milliseconds of the processor a request: of all that `auto` does, and of that for the prompt's tokens. The best
    of five, as other threads take the caches."""
    parts = parts_of(client)
    caller = parts.auth.caller({}, "inference")
    bodies = [json.dumps({"model": "auto", "messages": said(text)}).encode() for text in texts]
    tokenize = next(iter(parts.auto._by_base.values())).text.tokens
    whole, of_tokens = [], []
    for _ in range(5):
        requests = list(map(InferenceRequest, bodies))
        began = time.thread_time()
        for request in requests:
            parts.auto.settle(request, CHAT, caller)
        whole.append(time.thread_time() - began)
        began = time.thread_time()
        for text in texts:
            tokenize(text[:1024])
        of_tokens.append(time.thread_time() - began)
    return 1000 * min(whole) / len(texts), 1000 * min(of_tokens) / len(texts)


def there(kind: str) -> bool:
    try:
        return bool(pool(kind))
    except Unreachable as missing:
        print(f"without {kind}: {missing}")
        return False


async def measure(tasks: list[str], elsewhere: list[str], known: list[str], reference: int, held_out: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = settings(folder, tasks, reference)
        async with Started(config, FakeBackend(config.model)) as client:
            ends = {}
            for seed, task in enumerate(tasks):
                pushed = await client.post("/v1/adapters", **upload(tiny.adapter(folder / task, seed), task))
                pushed.raise_for_status()
                ends[task] = await refer(client, task, pool(task)[: reference + MORE])
            if known:
                await refer(client, "base", mixed(known, reference))
            print("| Task | asked | right | close | foreign | another adapter |\n" + "|---" * 6 + "|")
            right = whole = 0
            for task in tasks:
                texts = pool(task)[ends[task] : ends[task] + held_out]
                told = await asked(client, texts)
                by_reason = Counter(reason for _, reason in told.elements())
                hits, wrong = told[task, "fits"], by_reason["fits"] - told[task, "fits"]
                right, whole = right + hits, whole + len(texts)
                print(f"| {task} | {len(texts)} | {hits} | {by_reason['close']} | {by_reason['foreign']} | {wrong} |")
            print(f"right: {right / whole:.1%} of {whole}")
            outside = total = 0
            for kind in elsewhere:
                told = await asked(client, pool(kind)[:held_out])
                default = sum(count for (name, _), count in told.items() if name == "base")
                outside, total = outside + default, total + told.total()
                kind += ", which the base is asked" if kind in known else ", new to all"
                others = {name: count for (name, _), count in told.most_common() if name != "base"}
                print(f"| {kind} | {told.total()} | {default} to the default | {others} |")
            print(f"to the default: {outside / total:.1%} of {total}")
            texts = [text for task in tasks for text in pool(task)[ends[task] :][:40]]
            print("{:.3f} ms of the processor a request, {:.3f} of it for tokens".format(*cost(client, texts)))


def main() -> None:
    options = argparse.ArgumentParser(description="how often auto is right")
    options.add_argument("--held-out", type=int, default=300)
    options.add_argument("--reference", type=int, default=1000)
    options.add_argument("--near", action="store_true", help="three adapters more, of tasks near the others'")
    options.add_argument(
        "--base", choices=["all", "half", "none"], default="all", help="what the base is asked by name"
    )
    chosen = options.parse_args()
    tasks = [task for task in (*TASKS, *(NEAR if chosen.near else ())) if there(task)]
    elsewhere = [kind for kind in ELSEWHERE if there(kind)]
    known = {"all": elsewhere, "half": elsewhere[::2], "none": []}[chosen.base]
    asyncio.run(measure(tasks, elsewhere, known, chosen.reference, chosen.held_out))


if __name__ == "__main__":
    main()
