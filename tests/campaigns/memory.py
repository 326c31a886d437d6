"""`make memory`: what a running server takes, process by process, and how soon it is ready.

    python -m tests.campaigns.memory [--size 1B | --model DIR] [--weights auto int8 int4] [--kv 1G] [--adapters 16]
        [SERVER ARGS]

Each server answers some requests, one of them with a prompt of 2,000 tokens. Then its processes are asked for their
part of the memory (PSS: what several share is divided among them), for what is theirs alone, and for the most that was
ever resident in each, which counts what is shared for each and the checkpoint's pages while they are read. `at most` is
the largest sum of PSS that was seen since the start, five times a second. Last comes what `loradock plan` says. One
server at a time; MB are millions.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.campaigns.cpu_speed import processor, random_adapters
from tests.campaigns.random_model import SIZES, random_model
from tests.support.server import Server, descendants


@dataclass(frozen=True)
class Process:
    """One of a server's, in MB."""

    name: str
    pss: float
    private: float
    peak: float


def processes(pid: int) -> list[Process]:
    """A process and all that came from it, the largest first."""
    found = [_process(one) for one in {pid} | descendants(pid)]
    return sorted((one for one in found if one), key=lambda one: -one.pss)


def _process(pid: int) -> Process | None:
    folder = Path(f"/proc/{pid}")
    try:
        rollup = dict(re.findall(r"^(\w+):\s+(\d+) kB", (folder / "smaps_rollup").read_text(), re.MULTILINE))
        status = dict(re.findall(r"^(\w+):\s+(\d+) kB", (folder / "status").read_text(), re.MULTILINE))
        words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return None
    if not rollup:
        return None
    name = words if words.startswith("loradock:") else "loradock serve" if " serve " in words else "resource tracker"
    private = int(rollup["Private_Clean"]) + int(rollup["Private_Dirty"])
    sizes = (int(rollup["Pss"]), private, int(status.get("VmHWM", 0)))
    return Process(name, *(size * 1024 / 1e6 for size in sizes))


@contextmanager
def watched(pid: int) -> Iterator[list[float]]:
    """What a process and all that came from it have taken together, at most: the list's one number."""
    most, ended = [0.0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.2):
            most[0] = max(most[0], sum(one.pss for one in processes(pid)))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        ended.set()
        thread.join()


def measure(model: Path, weights: str, kv: int, adapters: int, more: list[str]) -> tuple[list[Process], float, float]:
    """A server's processes after it has answered with each of so many adapters of rank 8, the most that they took, and
    when it was ready."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = [
            "--name",
            "base",
            "--max-model-len",
            "4096",
            "--kv-cache-memory-bytes",
            str(kv),
            "--cpu-weights",
            weights,
        ]
        for setting in ("--max-loras", "--max-cpu-loras"):
            settings += [setting, str(max(adapters, 1))]
        settings += ["--max-lora-rank", "8", *more]
        made = random_adapters(model, adapters, folder)
        started = Server(folder / "data", folder / "log", *settings, model=str(model))
        with watched(started.process.pid) as most, started as server:
            for adapter in made:
                server.upload(adapter.name, adapter).raise_for_status()
            for asked in ["base", *(adapter.name for adapter in made)]:
                prompt = "The quick brown fox " * (500 if asked == "base" else 25)
                body = {"model": asked, "prompt": prompt, "max_tokens": 32, "ignore_eos": True}
                server.http.post("/v1/completions", json=body, timeout=600).raise_for_status()
            return processes(server.process.pid), most[0], server.seconds_to_ready


def main() -> None:
    from serve.config import size
    from serve.models.embedded import ensure
    from serve.models.memory_plan import plan

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=SIZES, help="random weights instead of the embedded model")
    parser.add_argument("--model", type=Path, help="a checkpoint")
    parser.add_argument("--keep", type=Path, help="where the random model stays")
    parser.add_argument("--weights", nargs="*", default=["auto", "int8", "int4"], help="values of --cpu-weights")
    parser.add_argument("--kv", default="1G")
    parser.add_argument("--adapters", type=int, default=0)
    given, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as name:
        model, kv = given.model or ensure("smollm2"), size(given.kv)
        if given.size:
            kept = given.keep or Path(name, given.size)
            model = kept if kept.is_dir() else random_model(given.size, model, kept)
        print(f"{given.size or model.name}, {given.kv} of KV cache, {given.adapters} adapters, {processor()}\n")
        print("| weights | process | PSS, MB | its own | the most resident |\n|---|---|---|---|---|")
        for weights in given.weights:
            found, most, seconds = measure(model, weights, kv, given.adapters, more)
            for one in found:
                print(f"| {weights} | {one.name} | {one.pss:,.0f} | {one.private:,.0f} | {one.peak:,.0f} |")
            together = sum(one.pss for one in found)
            said = f"**together**, ready after {seconds:.1f} s"
            print(f"| {weights} | {said} | **{together:,.0f}** | | at most {most:,.0f} |")
            slots = max(given.adapters, 1)
            planned = plan(
                str(model), max_loras=slots, max_cpu_loras=slots, rank=8, kv_cache=kv, cpu_weights=weights
            ).total
            print(
                f"| {weights} | `loradock plan` | {planned / 1e6:,.0f}, {planned / 1e6 / together:.2f} of it | | |",
                flush=True,
            )


if __name__ == "__main__":
    main()
