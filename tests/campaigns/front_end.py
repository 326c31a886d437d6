"""What a token costs between an engine and a client's socket: server CPU a token, waits between tokens, first tokens.

    python -m tests.campaigns.front_end [--streams 1000] [--rate 15] [--seconds 10] [--rounds 2]
                                        [--against CHECKOUT] [--kinds plain,logprobs,tools] [--without vllm]
                                        [--front-ends 1,2]

The engine is scripted (tests.support.scripted_core): a process of its own that gives every stream a token a step, over
vLLM's own protocol, and computes nothing. Everything between is real: sockets, HTTP, vLLM's tokenizer, this server with
its defaults. The same streams go, in turns, to this checkout, to another one (`--against`), and to `vllm serve`.

CPU is the server's process and its further front ends, all threads, kernel and user, while all streams run and none
begins or ends. What a server carries is by its busiest process: tokens a second that keep that one busy on a core, all
others beside it. So it can be told on a machine whose clients take the cores of the front ends. A wait
is the time between two reads of a stream in which tokens were; with `--rate 15` an engine makes one every 67 ms.
A server that cannot keep up, or that coalesces, sends several tokens at a time: there are less reads than tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import uvloop

from serve.models.embedded import ensure
from tests.support.scripted_core import Addresses, run
from tests.support.server import environment, free_port, tail

ROOT = Path(__file__).parents[2]
SERVER = ROOT / "tests" / "support" / "scripted_server.py"
SCRIPT = (
    "The harbour was quiet in the early morning, and only a few gulls moved over the water. Zürich, 12 °C; "
    'she wrote "five ships, two of them from Oslo" into the book, closed it, and went up to the house. '
)
TOKENS = 8000
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "logprobs": {"logprobs": True, "top_logprobs": 2},
    "tools": {
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": "weather",
                    "description": "The weather of a city",
                    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
                },
            }
        ]
    },
}
# A part of the places is kept for other tenants: 1,280 hold 1,000 streams of one.
OPTIONS = ("--max-model-len", "8192", "--max-num-seqs", "1280", "--kv-cache-memory-bytes", "1G")
_TEXT = re.compile(rb'"(?:content|text|reasoning)":"[^"]')
START_SECONDS = 600
FRONT_END = "front end"


@dataclass(slots=True)
class Load:
    """What the clients saw of all streams; times in seconds."""

    tokens: int = 0
    reads: int = 0
    waits: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    broken: int = 0
    counting: bool = False


class Stream(asyncio.Protocol):
    """One client of a stream that does not end."""

    def __init__(self, request: bytes, load: Load) -> None:
        self._request = request
        self._load = load
        self._sent = self._last = 0.0
        self.transport: Any = None
        self.first = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self._sent = time.perf_counter()
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        tokens = data.count(b"data: {")
        if self._last and tokens:
            if self._load.counting:
                self._load.tokens += tokens
                self._load.reads += 1
                self._load.waits.append(now - self._last)
            self._last = now
        elif not self._last and _TEXT.search(data):
            self._last = now
            self._load.first.append(now - self._sent)
            self.first.set_result(True)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.transport.is_closing() or not self.first.done():
            self._load.broken += 1
        if not self.first.done():
            self.first.set_exception(ConnectionError("the stream ended before its first token"))


@dataclass(frozen=True)
class Figures:
    """One run of one server with one kind of request."""

    micros: float  # of CPU for a token, all processes together
    by_process: tuple[float, ...]  # the server's own, then its further front ends
    wait_p50: float
    wait_p99: float
    first_p50: float
    first_p99: float
    reads: float
    rate: float  # tokens a second that the engine made
    cores: float

    @property
    def busiest(self) -> float:
        return max(self.by_process)

    def line(self) -> str:
        parts = " + ".join(f"{micros:.1f}" for micros in self.by_process)
        return (
            f"{self.micros:6.1f} us a token ({parts}), {self.cores:.2f} cores at {self.rate:.0f} tokens/s; "
            f"between tokens {self.wait_p50:.0f} ms p50, {self.wait_p99:.0f} p99; first {self.first_p50:.0f} ms p50, "
            f"{self.first_p99:.0f} p99; {self.reads:.2f} reads a token"
        )


@dataclass(frozen=True)
class Party:
    """A server to measure."""

    name: str
    kind: str
    root: Path
    options: tuple[str, ...] = ()


class Running:
    """A server and its scripted engine."""

    def __init__(self, party: Party, folder: Path, rate: float, script: list[int], profile: str = "") -> None:
        self.port = free_port()
        addresses = Addresses(f"ipc://{folder}/input", f"ipc://{folder}/output")
        self.log = folder / "server.log"
        context = multiprocessing.get_context("spawn")
        self.emitted = context.Value("q", 0, lock=False)
        self.stop = context.Value("b", 0, lock=False)
        self.core = context.Process(target=run, args=([addresses], script, rate, self.emitted, self.stop), daemon=True)
        words = ["serve", str(ensure("smollm2")), "--port", str(self.port), *OPTIONS, *party.options]
        if party.kind == "loradock":
            words += ["--data-dir", str(folder / "data")]
        else:
            words += ["--disable-uvicorn-access-log"]
        command = [sys.executable, "-P", str(SERVER), party.kind, addresses.input, addresses.output, *words]
        patches = {"LORADOCK_VLLM_PATCHES": "no-fork-server"} if party.kind == "loradock" else {}
        if profile:
            patches["PROFILE"] = profile
        with self.log.open("wb") as out:
            self.server = subprocess.Popen(
                command,
                env=environment(PYTHONPATH=str(party.root), OMP_NUM_THREADS="1", **patches),
                cwd=party.root,
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )
        self.core.start()

    def wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        with httpx.Client(base_url=f"http://127.0.0.1:{self.port}") as http:
            for path in ("/ready", "/health"):
                while True:
                    if self.server.poll() is not None or time.monotonic() > deadline:
                        raise RuntimeError(f"the server did not start:\n{tail(self.log)}")
                    with suppress(httpx.TransportError):
                        answer = http.get(path, timeout=5)
                        if answer.status_code == 200 or (path == "/ready" and answer.status_code == 404):
                            break
                    time.sleep(0.2)
            self.model = http.get("/v1/models").json()["data"][0]["id"]

    def close(self) -> None:
        self.server.terminate()
        try:
            self.server.wait(40)
        except subprocess.TimeoutExpired:
            self.server.kill()
        self.stop.value = 1
        self.core.join(5)
        if self.core.is_alive():
            self.core.kill()

    @property
    def cpu(self) -> dict[int, float]:
        """Seconds by process: the server's own, then its further front ends."""
        server = psutil.Process(self.server.pid)
        others = [child for child in server.children() if any(FRONT_END in word for word in child.cmdline())]
        times = [(each.pid, each.cpu_times()) for each in (server, *others)]
        return {pid: float(each.user + each.system) for pid, each in times}


@contextmanager
def running(party: Party, rate: float, script: list[int], profile: str = "") -> Iterator[Running]:
    with tempfile.TemporaryDirectory() as folder:
        server = Running(party, Path(folder), rate, script, profile)
        try:
            server.wait()
            yield server
        finally:
            server.close()


async def measured(server: Running, kind: str, streams: int, seconds: float, profile: bool) -> Figures:
    """So many streams at once, begun one after the other, looked at once all of them have their first token."""
    body = {
        "model": server.model,
        "messages": [{"role": "user", "content": "Tell me of the harbour."}],
        "max_tokens": TOKENS,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
        **KINDS[kind],
    }
    content = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(content)}\r\n"
    request = f"{head}content-type: application/json\r\n\r\n".encode() + content
    load, loop = Load(), asyncio.get_running_loop()
    clients: list[Stream] = []
    for _ in range(streams):
        _, client = await loop.create_connection(lambda: Stream(request, load), "127.0.0.1", server.port)
        clients.append(client)
        await asyncio.sleep(0.004)
    async with asyncio.timeout(120):
        await asyncio.gather(*(client.first for client in clients))
    await asyncio.sleep(2)
    if profile:
        server.server.send_signal(signal.SIGUSR1)
    load.counting, cpu, emitted, began = True, server.cpu, server.emitted.value, time.perf_counter()
    await asyncio.sleep(seconds)
    load.counting, took = False, time.perf_counter() - began
    tokens = server.emitted.value - emitted
    used = [seconds - cpu[pid] for pid, seconds in server.cpu.items()]
    if profile:
        server.server.send_signal(signal.SIGUSR2)
        await asyncio.sleep(1)
    for client in clients:
        client.transport.abort()
    await asyncio.sleep(3)
    if load.broken:
        raise RuntimeError(f"{load.broken} streams broke off:\n{tail(server.log)}")
    waits, first = quantiles(load.waits), quantiles(load.first)
    return Figures(
        1e6 * sum(used) / tokens, tuple(1e6 * each / tokens for each in used),
        1e3 * waits(50), 1e3 * waits(99), 1e3 * first(50), 1e3 * first(99),
        load.reads / tokens, tokens / took, sum(used) / took,
    )  # fmt: skip


def quantiles(values: list[float]) -> Callable[[int], float]:
    ordered = sorted(values)
    return lambda percent: ordered[min(len(ordered) - 1, len(ordered) * percent // 100)] if ordered else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=15.0, help="tokens a second of each stream")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--against", type=Path, help="another checkout of this project")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--front-ends", default="1", help="how many this checkout has, each in turn: 1,2")
    parser.add_argument("--without", default="", help="parties to leave out: this, vllm")
    parser.add_argument("--profile", default="", help="a file for cProfile's statistics of this checkout's server")
    asked = parser.parse_args()
    from transformers import AutoTokenizer

    script = AutoTokenizer.from_pretrained(ensure("smollm2"))(SCRIPT, add_special_tokens=False)["input_ids"]
    tools = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
    parties = [
        Party(f"this {count}" if count != "1" else "this", "loradock", ROOT, (*tools, "--front-ends", count))
        for count in asked.front_ends.split(",")
    ]
    if asked.against:
        parties.append(Party("against", "loradock", asked.against.resolve(), tools))
    parties.append(Party("vllm", "vllm", ROOT, tools))
    parties = [party for party in parties if party.name not in asked.without.split(",")]
    seen: dict[tuple[str, str], list[Figures]] = {}
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for number in range(asked.rounds):
        for party in parties if number % 2 == 0 else parties[::-1]:
            with running(party, asked.rate, script, asked.profile) as server:
                for kind in asked.kinds.split(","):
                    found = uvloop.run(measured(server, kind, asked.streams, asked.seconds, bool(asked.profile)))
                    seen.setdefault((party.name, kind), []).append(found)
                    print(f"{party.name:8} {kind:9} {found.line()}", flush=True)
    for (name, kind), runs in seen.items():
        micros, busiest = (statistics.median(each) for each in zip(*((r.micros, r.busiest) for r in runs), strict=True))
        carried = f"{1e6 / busiest:.0f} tokens/s by its busiest process"
        if name != "this" and (alone := seen.get(("this", kind))):
            carried += f", {statistics.median(run.busiest for run in alone) / busiest:.2f} times what one carries"
        print(f"{name:8} {kind:9} median {micros:.1f} us a token, {carried}")


if __name__ == "__main__":
    main()
