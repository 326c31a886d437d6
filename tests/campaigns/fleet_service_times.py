"""What an engine takes for a step, a prompt and an adapter, for `tests.campaigns.fleet_sim`. On a quiet machine.

    python -m tests.campaigns.fleet_service_times OUT.json [--seats 16] [--resident 256]

The embedded model answers on this machine's processor. Steps are timed with one answer under way and with `--seats`,
prompts of two lengths, and adapters that are loaded from the server's disk as they are asked in turn. `--resident`,
which costs memory alone, is written as it is given. `fetch` is the time that a copy of an adapter takes from an S3
server of this machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from tests.support.lora import WORDS, trained, variant
from tests.support.server import SMALL, Server

ADAPTERS = 24
SHORT, LONG = 16, 528
WORD = " tree"


def streamed(server: Server, model: str, prompt: str, tokens: int) -> tuple[float, float]:
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
    with server.http.stream("POST", "/v1/completions", json=body) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                times.append(time.perf_counter())
    return times[0] - began, (times[-1] - times[0]) / max(len(times) - 1, 1)


def step_seconds(server: Server, count: int) -> float:
    """Seconds between two tokens with `count` answers under way, each of another prompt."""
    found: list[float] = []

    def one(number: int) -> None:
        found.append(streamed(server, "tone-0", f"{number}" + WORD * SHORT, 96)[1])

    threads = [threading.Thread(target=one, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return statistics.median(found)


def prompt_seconds(server: Server) -> float:
    """Seconds that one more token of a prompt takes."""
    times = {SHORT: list[float](), LONG: list[float]()}
    for number in range(12):
        for length, firsts in times.items():
            firsts.append(streamed(server, "tone-0", f"{number} {length}" + WORD * length, 2)[0])
    short, long = (statistics.median(firsts[2:]) for firsts in times.values())
    return (long - short) / (LONG - SHORT)


def load_seconds(server: Server) -> tuple[float, int]:
    """Seconds that an adapter takes into the engine, as the server's own histogram has it, and of how many."""

    def counted() -> tuple[float, float]:
        lines = dict(line.rsplit(" ", 1) for line in server.http.get("/metrics").text.splitlines() if line[:1] != "#")
        name = 'loradock_adapter_load_seconds_{}{{tier="disk"}}'
        return float(lines[name.format("sum")]), float(lines[name.format("count")])

    seconds, count = counted()
    for _ in range(2):
        for number in range(ADAPTERS):
            streamed(server, f"tone-{number}", "Hello", 2)
    after, loads = counted()
    return (after - seconds) / (loads - count), int(loads - count)


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
    with Server(folder / "data", folder / "log", *flags) as server:
        for number in range(ADAPTERS):
            pushed = server.upload(
                f"tone-{number}", variant(alpha, folder / f"adapter-{number}", scale=1 - number / 1000)
            )
            pushed.raise_for_status()
        step_seconds(server, 1)  # warm
        one = statistics.median(step_seconds(server, 1) for _ in range(3))
        many = statistics.median(step_seconds(server, seats) for _ in range(3))
        prompt = prompt_seconds(server)
        load, loads = load_seconds(server)
    per_answer = max(many - one, 0.0) / (seats - 1)
    service = {
        "step": round(one - per_answer, 6),
        "step_per_answer": round(per_answer, 6),
        "prompt_token": round(prompt, 7),
        "load": round(load, 5),
        "fetch": round(fetch_seconds(alpha), 5),
        "seats": seats,
        "resident": resident,
    }
    nbytes = sum(file.stat().st_size for file in alpha.iterdir())
    return {"service": service, "loads": loads, "adapter_bytes": nbytes}


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
