"""What an engine takes for a step, a prompt and an adapter, for `tests.campaigns.fleet_sim`. On a quiet machine.

    python -m tests.campaigns.fleet_service_times OUT.json [--seats 16] [--resident 256]

The embedded model answers on this machine's processor. Steps are timed with one answer under way and with eight,
prompts of two lengths, and the first tokens of adapters that are loaded as they are asked in turn. `--seats` and
`--resident`, which costs memory alone, are written as they are given. `fetch` is the time that a copy of an adapter
takes from an S3 server of this machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx

from tests.campaigns.fleet_sim import Service
from tests.support.lora import WORDS, trained, variant
from tests.support.run_delay import ran, slowness
from tests.support.server import SMALL, Server, descendants

ADAPTERS = 24
SHORT, LONG = 16, 528
WORD = " tree"


def streamed(http: httpx.Client, model: str, prompt: str, tokens: int) -> tuple[float, float]:
    """Seconds to the first token, and the mean between two."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": tokens,
        "stream": True,
        "ignore_eos": True,
        "temperature": 0,
    }
    began, times = time.perf_counter(), []
    with http.stream("POST", "/v1/completions", json=body) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                times.append(time.perf_counter())
    return times[0] - began, (times[-1] - times[0]) / max(len(times) - 1, 1)


def step_seconds(http: httpx.Client, names: Sequence[str], count: int, tokens: int = 96) -> float:
    """Seconds between two tokens with `count` answers under way, each of another prompt, by these names in turn."""

    def one(number: int) -> float:
        return streamed(http, names[number % len(names)], f"{number}" + WORD * SHORT, tokens)[1]

    with ThreadPoolExecutor(count) as pool:
        return statistics.median(pool.map(one, range(count)))


def first_seconds(http: httpx.Client, names: Sequence[str], length: int = 1, count: int = 12) -> float:
    """Seconds to the first token of a prompt of this length, by these names in turn; nothing else is under way."""
    firsts = [
        streamed(http, names[number % len(names)], f"{number} {length}" + WORD * length, 2)[0]
        for number in range(count + 2)
    ]
    return statistics.median(firsts[2:])


def steps_beside(one: httpx.Client, other: httpx.Client, names: Sequence[str], count: int) -> float:
    """Seconds between two tokens while the other server answers as much."""
    with ThreadPoolExecutor(2) as pool:
        return statistics.fmean(pool.map(lambda http: step_seconds(http, names, count), (one, other)))


def service_of(
    one: httpx.Client,
    names: Sequence[str],
    seats: int,
    resident: int,
    fetch: float,
    other: httpx.Client | None = None,
    door: httpx.Client | None = None,
    engine: Sequence[int] = (),
) -> Service:
    """Of the engine of `one`, which holds fewer adapters than there are names. `other` is a server of the same machine,
    and `door` the address that clients ask. What the processes of the `engine` wait for a processor is left out."""

    def alone(measure: Callable[[], float]) -> float:
        before = ran(engine)
        seconds = measure()
        return seconds / (slowness(before, ran(engine)) or 1.0)

    hot = names[:4]
    step_seconds(one, hot, 1)  # warm
    single = statistics.median(alone(lambda: step_seconds(one, hot[:1], 1)) for _ in range(3))
    several = min(seats, 8)
    many = statistics.median(alone(lambda: step_seconds(one, hot, several)) for _ in range(3))
    short, long = (alone(lambda length=length: first_seconds(one, hot[:1], length)) for length in (SHORT, LONG))
    prompt = (long - short) / (LONG - SHORT)
    cold = alone(lambda: first_seconds(one, names, SHORT, max(len(names), 24)))
    outside = alone(lambda: first_seconds(door or one, hot[:1], SHORT, 24))
    per_answer = max(many - single, 0.0) / (several - 1)
    both = alone(lambda: steps_beside(one, other, hot, 3)) if other else 0.0
    beside = both / alone(lambda: step_seconds(one, hot, 3)) if other else 1.0
    return Service(
        step=round(single - per_answer, 6),
        step_per_answer=round(per_answer, 6),
        prompt_token=round(prompt, 7),
        load=round(max(cold - short, 0.0), 5),
        fetch=round(fetch, 5),
        seats=seats,
        resident=resident,
        overhead=round(max(outside - SHORT * prompt - single, 0.0), 5),
        beside=round(max(beside, 1.0), 3),
        on_cpu=True,
    )


def fetch_seconds(folder: Path) -> float:
    """Seconds for the files of an adapter from an S3 server of this machine."""
    import os

    import boto3
    import moto.server

    from serve.adapters.shared_store import SharedStore

    server = moto.server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {
        "AWS_ENDPOINT_URL_S3": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "me",
        "AWS_SECRET_ACCESS_KEY": "mine",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL_S3"]).create_bucket(Bucket="models")
    store = SharedStore("s3://models/adapters")
    times = []
    for number in range(8):
        digest = f"{number:064x}"
        store.put(digest, folder)
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as target:
            store.get(digest, Path(target))
        times.append(time.perf_counter() - began)
    server.stop()
    return statistics.median(times[1:])


def measured(seats: int, resident: int) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp())
    alpha = trained(*WORDS)[WORDS[0]]
    flags = ("--max-loras", "4", "--max-cpu-loras", "4", "--no-drift", "--no-probe", *SMALL)
    names = [f"tone-{number}" for number in range(ADAPTERS)]
    with Server(folder / "data", folder / "log", *flags) as server:
        for number, name in enumerate(names):
            pushed = server.upload(name, variant(alpha, folder / f"adapter-{number}", scale=1 - number / 1000))
            pushed.raise_for_status()
        service = service_of(
            server.http, names, seats, resident, fetch_seconds(alpha), engine=[*descendants(server.process.pid)]
        )
    nbytes = sum(file.stat().st_size for file in alpha.iterdir())
    return {"service": asdict(service), "adapter_bytes": nbytes}


def main() -> None:
    from tests.campaigns.cpu_speed import processor

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seats", type=int, default=16)
    parser.add_argument("--resident", type=int, default=256)
    options = parser.parse_args()
    found = measured(options.seats, options.resident)
    found |= {"processor": str(processor()), "model": "smollm2", "date": time.strftime("%Y-%m-%d")}
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
