"""`make vllm-base`: loradock's base against vLLM's own best on this machine, whole servers over HTTP, in turns.

vLLM has what its CPU page recommends: every core bound and none kept back, tcmalloc where the system has it, Intel's
OpenMP; it compiles, and takes no adapters. loradock has its defaults. Both get the same prompts, one after the other in
every round. The table has medians with the least and the most, and the median of the rounds' ratios.

    python -m tests.campaigns.vllm_base [--rounds 12] [--weights auto int8 int4] [--size 1B]

vLLM compiles for a minute or two the first time. Both servers take some 7 GB of memory together.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from statistics import median

import httpx

from tests.campaigns.cpu_speed import CASES, LONG, SIZES, Choice, Up, answer, cell, loradock, measure, processor
from tests.campaigns.random_model import random_model
from tests.support.server import START_SECONDS, free_port

PROMPTS, EACH = 8, 32
EVERY = (*CASES, f"tok/s, {PROMPTS} x ({LONG:,} in, {EACH} out)", "ms a token there")
# What loradock is to be ahead by, where it is mostly prompts and elsewhere.
AHEAD, OF_PROMPTS = 1.0, 1.5


@contextmanager
def vllm(model: Path, folder: Path, cache: str) -> Iterator[Up]:
    from serve.models.hardware import openmp, tcmalloc

    cores = sorted(os.sched_getaffinity(0))
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("LORADOCK_", "OMP_", "KMP_"))}
    environ |= {
        "VLLM_PLUGINS": "",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "LD_PRELOAD": ":".join(library for library in (tcmalloc(), openmp()) if library),
    }
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--port", str(port), "--model", str(model)]
    command += ["--served-model-name", "base", "--max-model-len", "2048", "--no-enable-prefix-caching"]
    command += ["--kv-cache-memory-bytes", cache]
    log = folder / "vllm.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=environ, stdout=out, stderr=out)
    try:
        ends = time.monotonic() + 2 * START_SECONDS
        while True:
            with suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            if process.poll() is not None or time.monotonic() > ends:
                raise RuntimeError(f"vLLM does not start:\n{log.read_text()[-4000:]}")
            time.sleep(1)
        yield Up(f"http://127.0.0.1:{port}", process.pid, ["base"], "bfloat16")
    finally:
        process.terminate()
        process.wait()


async def beside(choice: Choice, up: Up) -> None:
    """Long prompts at once."""
    async with httpx.AsyncClient(timeout=900) as http:
        began = time.monotonic()
        one = [answer(http, up, False, up.models[0], LONG, EACH) for _ in range(PROMPTS)]
        times = await asyncio.gather(*one)
    choice.seen.setdefault(EVERY[3], []).append(PROMPTS * EACH / (time.monotonic() - began))
    waits = [1000 * (each[-1] - each[0]) / (len(each) - 1) for each in times]
    choice.seen.setdefault(EVERY[4], []).append(sum(waits) / len(waits))


def ahead(case: str, ours: list[float], theirs: list[float]) -> list[float]:
    """How many times as fast, in each round."""
    pairs = zip(ours, theirs, strict=True)
    return [one / other if case.startswith("tok/s") else other / one for one, other in pairs]


def main() -> None:
    from serve.models.embedded import ensure

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--weights", nargs="*", default=["auto"], help="--cpu-weights of loradock's servers")
    parser.add_argument("--size", choices=SIZES, help="random weights instead of the embedded model")
    parser.add_argument("--kv-cache", default="1G", help="of each server")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = ensure("smollm2")
        if given.size:
            model = random_model(given.size, model, folder / given.size)
        theirs = Choice("vLLM", lambda: vllm(model, folder, given.kv_cache))
        ours = [
            Choice(f"loradock {each}", lambda each=each: loradock(model, each, [], folder, given.kv_cache))
            for each in given.weights
        ]
        every = [theirs, *ours]
        with ExitStack() as stack:
            up = {choice.name: stack.enter_context(choice.start()) for choice in every}
            for number in range(given.rounds + 1):
                for choice in every if number % 2 else every[::-1]:
                    asyncio.run(measure(choice, up[choice.name]))
                    asyncio.run(beside(choice, up[choice.name]))
                if number == 0:  # what is loaded or compiled at the first request of its kind
                    for choice in every:
                        choice.seen.clear()
    print(f"{given.size or model.name}, {given.rounds} rounds, {processor()}\n")
    print(f"| | {' | '.join(EVERY)} | memory |\n|---|{'---|' * len(EVERY)}---|")
    for choice in every:
        cells = [choice.name, *(cell(choice.seen[case]) for case in EVERY), f"{choice.memory / 1e9:.1f} GB"]
        print(f"| {' | '.join(cells)} |")
    behind = []
    for choice in ours:
        ratios = {case: ahead(case, choice.seen[case], theirs.seen[case]) for case in EVERY}
        print(f"| {choice.name}, times as fast | {' | '.join(map(cell, ratios.values()))} | |")
        for number, (case, found) in enumerate(ratios.items()):
            if median(found) < (wanted := AHEAD if number < 2 else OF_PROMPTS):
                behind.append(f"{choice.name}, {case}: {median(found):.2f} times as fast, not {wanted}")
    if behind:
        sys.exit("\n".join(["", *behind]))


if __name__ == "__main__":
    main()
