"""`make memory`: what a running server takes, process by process, and how soon it is ready.

    python -m tests.campaigns.memory [--size 1B] [--weights auto int8 int4] [--kv 1G] [--adapters 16] [SERVER ARGS]

Each server answers some requests. Then its processes are asked for their part of the memory (PSS: what several share is
divided among them), for what is theirs alone, and for the most that was ever resident in each, which counts what is
shared for each and the checkpoint's pages while they are read. One server at a time.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.campaigns.cpu_speed import SIZES, processor, random_adapters, random_model
from tests.support.server import Server, descendants


@dataclass(frozen=True)
class Process:
    """One of a server's, in MiB."""

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
    return Process(name, int(rollup["Pss"]) / 1024, private / 1024, int(status.get("VmHWM", 0)) / 1024)


def measure(model: Path, weights: str, kv: str, adapters: int, more: list[str]) -> tuple[list[Process], float]:
    """A server's processes after it has answered with each of so many adapters of rank 8, and when it was ready."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = [
            "--name",
            "base",
            "--max-model-len",
            "4096",
            "--kv-cache-memory-bytes",
            kv,
            "--cpu-weights",
            weights,
        ]
        settings += ["--max-loras", str(max(adapters, 1)), "--max-lora-rank", "8", *more]
        made = random_adapters(model, adapters, folder)
        with Server(folder / "data", folder / "log", *settings, model=str(model)) as server:
            for adapter in made:
                server.upload(adapter.name, adapter).raise_for_status()
            for asked in ["base", *(adapter.name for adapter in made)]:
                body = {"model": asked, "prompt": "The quick brown fox " * 100, "max_tokens": 32, "ignore_eos": True}
                server.http.post("/v1/completions", json=body).raise_for_status()
            return processes(server.process.pid), server.seconds_to_ready


def main() -> None:
    from serve.models.embedded import ensure

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=SIZES, help="random weights instead of the embedded model")
    parser.add_argument("--keep", type=Path, help="where the random model stays")
    parser.add_argument("--weights", nargs="*", default=["auto", "int8", "int4"], help="values of --cpu-weights")
    parser.add_argument("--kv", default="1G")
    parser.add_argument("--adapters", type=int, default=0)
    given, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as name:
        model = ensure("smollm2")
        if given.size:
            kept = given.keep or Path(name, given.size)
            model = kept if kept.is_dir() else random_model(given.size, model, kept)
        print(f"{given.size or model.name}, {given.kv} of KV cache, {given.adapters} adapters, {processor()}\n")
        print("| weights | process | PSS, MiB | its own | the most resident |\n|---|---|---|---|---|")
        for weights in given.weights:
            found, seconds = measure(model, weights, given.kv, given.adapters, more)
            for one in found:
                print(f"| {weights} | {one.name} | {one.pss:,.0f} | {one.private:,.0f} | {one.peak:,.0f} |")
            together = sum(one.pss for one in found)
            print(f"| {weights} | **together**, ready after {seconds:.1f} s | **{together:,.0f}** | | |", flush=True)


if __name__ == "__main__":
    main()
