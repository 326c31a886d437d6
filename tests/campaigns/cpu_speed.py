"""`make cpu-speed`: a model with each `--cpu-weights` and, where they are there, llama.cpp's formats, in turns.

Whole servers over HTTP: a token's time at one stream, tokens a second at 16, the first token of 1,024. A round takes
the cases in turn, and each case goes once over all servers (one stream three times), so that what is compared was
measured within seconds; `--apart` starts each for its turn alone, for models that do not fit side by side. How fast the
machine reads its memory, which neighbours change from one minute to the next, is asked before and after each turn of
one stream. The table has medians, and the least and the most; a second one, with llama.cpp, the ratios of turns. The
processor's name is part of it.

    python -m tests.campaigns.cpu_speed [--rounds 5] [--weights auto int8 int4] [--adapters 16] [--size 1B]
        [--llama .../bin/llama-server --gguf Q4_0=a.gguf Q4_K_M=b.gguf Q8_0=c.gguf]
        [--llama-lora .../convert_lora_to_gguf.py] [--against CHECKOUT ...]

With `--against` the same servers of other checkouts take their turns, and the ratios are this one's to theirs.

With `--adapters` the one stream has an adapter, and the 16 streams take turns among them. llama.cpp has the same ones
with `--llama-lora`, each named in its request, which is how its server takes several. GGUF files of the model come from
llama.cpp's `convert_hf_to_gguf.py` and `llama-quantize`; `--keep DIR` leaves the checkpoint of random weights that
`--size` makes there for it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import psutil

from tests.campaigns.random_model import SIZES, random_model
from tests.support.event_lines import async_event_lines
from tests.support.server import ROOT, Server, done, free_port

IN, OUT, LONG, LONGER, STREAMS, RANK = 128, 64, 1024, 4096, 16, 8
CONTEXT = 2048  # tokens of each stream
PROMPTS = {f"s to the first of {tokens:,} in": tokens for tokens in (LONG, LONGER)}
CASES = ("ms a token, 1 stream", f"tok/s, {STREAMS} streams", next(iter(PROMPTS)))
ALONE = 3  # times that one stream is measured in a round


@dataclass
class Choice:
    """One server to be measured: how it starts, how it is asked, and what was seen."""

    name: str
    start: Callable[[], Any]  # a context that gives a server's url, process and names of models
    llama: bool = False
    compared: bool = False  # with this checkout's, as another system or checkout
    seen: dict[str, list[float]] = field(default_factory=dict)
    weights: str = ""
    memory: int = 0
    machine: list[float] = field(default_factory=list)  # GB/s, beside each turn of one stream

    def row(self) -> str:
        cells = [self.name, self.weights, *map(cell, self.seen.values())]
        return f"| {' | '.join(cells)} | {self.memory / 1e9:.2f} GB |"


def cell(values: list[float]) -> str:
    return f"{median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


@dataclass(frozen=True, slots=True)
class Up:
    """A server that answers."""

    url: str
    pid: int
    models: list[str]
    weights: str = ""


async def answer(http: httpx.AsyncClient, up: Up, llama: bool, model: str, words: int, tokens: int) -> list[float]:
    """When each of its tokens came, after the moment it was asked."""
    text = " ".join(random.choices(("river", "stone", "cloud", "tree", "house", "road"), k=words))
    body: dict[str, Any] = {"model": model, "prompt": text, "max_tokens": tokens, "temperature": 0, "stream": True}
    body |= {"ignore_eos": True} | ({"cache_prompt": False} if llama else {})
    if llama and model.isdecimal():
        body["lora"] = [{"id": int(model), "scale": 1.0}]
    began, times = time.monotonic(), []
    async with http.stream("POST", f"{up.url}/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in async_event_lines(response):
            if line.startswith("data: {") and json.loads(line[6:])["choices"]:
                times.append(time.monotonic() - began)
    return times


async def measure(choice: Choice, up: Up, *cases: str) -> None:
    """Each of these cases once; every one where none is named."""
    # llama.cpp's server drops connections that are kept alive beside 16 others.
    limits = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(timeout=1800, limits=limits) as http:

        async def ask(model: str, words: int, tokens: int) -> list[float]:
            return await answer(http, up, choice.llama, model, words, tokens)

        def saw(case: str, value: float) -> None:
            choice.seen.setdefault(case, []).append(value)

        await ask(up.models[0], 16, 4)
        for case in cases or CASES:
            began = time.monotonic()
            if case == CASES[0]:
                alone = await ask(up.models[0], IN, OUT)
                saw(case, 1000 * (alone[-1] - alone[0]) / (OUT - 1))
            elif case == CASES[1]:
                await asyncio.gather(*(ask(up.models[i % len(up.models)], IN, OUT) for i in range(STREAMS)))
                saw(case, STREAMS * OUT / (time.monotonic() - began))
            else:
                saw(case, (await ask(up.models[0], PROMPTS[case], 1))[0])
    choice.weights = up.weights
    family = [psutil.Process(up.pid), *psutil.Process(up.pid).children(recursive=True)]
    choice.memory = max(choice.memory, sum(process.memory_full_info().pss for process in family))


@contextmanager
def loradock(
    model: Path, weights: str, adapters: list[Path], folder: Path, cache: str, root: Path = ROOT, context: int = CONTEXT
) -> Iterator[Up]:
    words = ["--cpu-weights", weights, "--no-probe", "--max-model-len", str(context), "--no-enable-prefix-caching"]
    words += ["--max-loras", str(max(1, len(adapters))), "--kv-cache-memory-bytes", cache]
    own = Path(tempfile.mkdtemp(dir=folder))
    with Server(own / "data", own / "log", *words, model=str(model), root=root) as server:
        for adapter in adapters:
            server.upload(adapter.stem, adapter).raise_for_status()
        base = done(server.http.get("/v1/models"))["data"][0]["id"]
        names = [adapter.stem for adapter in adapters] or [base]
        yield Up(server.url, server.process.pid, names, server.engine()["weights"])


@contextmanager
def llama(binary: Path, file: Path, adapters: list[Path], folder: Path, slots: int = STREAMS) -> Iterator[Up]:
    port = free_port()
    command = [str(binary.resolve()), "-m", str(file.resolve()), "--port", str(port)]
    command += ["-np", str(slots), "-c", str(CONTEXT * STREAMS)]
    if adapters:
        command += ["--lora", ",".join(map(str, adapters))]
    if len(adapters) > 1:  # one is applied at the start: ik_llama.cpp takes none with a request
        command += ["--lora-init-without-apply"]
    with (folder / f"{file.name}.{port}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)  # ik_llama.cpp writes a log of its own
    try:
        for _ in range(600):
            with suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            time.sleep(0.5)
        yield Up(f"http://127.0.0.1:{port}", process.pid, [str(i) for i in range(len(adapters))] or ["any"])
    finally:
        process.terminate()
        process.wait()


def random_adapters(model: Path, count: int, folder: Path) -> list[Path]:
    """Of rank 8, on all of a layer's matrices."""
    import torch
    from safetensors.torch import save_file

    config = json.loads((model / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    sizes = {"self_attn.q": (hidden, q), "self_attn.k": (hidden, kv), "self_attn.v": (hidden, kv),
             "self_attn.o": (q, hidden), "mlp.gate": (hidden, inner), "mlp.up": (hidden, inner),
             "mlp.down": (inner, hidden)}  # fmt: skip
    words = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "bias": "none", "task_type": "CAUSAL_LM",
             "target_modules": [f"{name.partition('.')[2]}_proj" for name in sizes]}  # fmt: skip
    made = []
    for number in range(count):
        tensors = {}
        for layer in range(config["num_hidden_layers"]):
            for name, (inputs, outputs) in sizes.items():
                place = f"base_model.model.model.layers.{layer}.{name}_proj"
                tensors[f"{place}.lora_A.weight"] = (torch.randn(RANK, inputs) * inputs**-0.5).bfloat16()
                tensors[f"{place}.lora_B.weight"] = (torch.randn(outputs, RANK) * 0.01).bfloat16()
        made.append(folder / f"adapter-{number}")
        made[-1].mkdir(parents=True)
        save_file(tensors, made[-1] / "adapter_model.safetensors")
        (made[-1] / "adapter_config.json").write_text(json.dumps(words))
    return made


def converted_adapter(script: Path, adapter: Path, model: Path) -> Path:
    """The adapter as llama.cpp's own script makes it."""
    file = adapter / "adapter.gguf"
    command = [sys.executable, str(script), "--base", str(model), "--outtype", "bf16", "--outfile", str(file)]
    path = {**os.environ, "PYTHONPATH": str(script.parent / "gguf-py")}
    subprocess.run([*command, str(adapter)], check=True, capture_output=True, env=path)
    return file


def choices(given: argparse.Namespace, model: Path, folder: Path) -> list[Choice]:
    adapters = random_adapters(model, given.adapters, folder / "adapters")

    def ours(weights: str, root: Path = ROOT) -> Choice:
        name = f"loradock {weights}" if root == ROOT else f"{root.name} {weights}"
        start = partial(loradock, model, weights, adapters, folder, given.kv_cache, root)
        return Choice(name, start, compared=root != ROOT)

    converted = [converted_adapter(given.llama_lora, adapter, model) for adapter in adapters if given.llama_lora]

    def theirs(label: str, file: Path) -> Choice:
        return Choice(
            f"llama.cpp {label}", lambda: llama(given.llama, file, converted, folder), llama=True, compared=True
        )

    files = dict(word.split("=", 1) for word in given.gguf) if given.llama else {}
    others = [ours(weights, root.resolve()) for root in given.against for weights in given.weights]
    return [*map(ours, given.weights), *others, *(theirs(label, Path(file)) for label, file in files.items())]


def bytes_read(model: Path, weights: str) -> float:
    """What a token of one stream reads of a Llama's weights, as a server names them, with their scales (`matrix.h`)."""
    config = json.loads((model / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    heads = 2 * config["num_attention_heads"] + 2 * config["num_key_value_heads"]
    layer = hidden * (heads * head + 3 * inner)
    layers, _, output = weights.partition("; output layer ")
    return (config["num_hidden_layers"] * layer * bits(layers) + config["vocab_size"] * hidden * bits(output)) / 8


def bits(weights: str) -> float:
    """Of a weight. Groups of 4 bits are taken to have one scale in common for 128 inputs where they have no offsets."""
    if weights.startswith("int4"):
        return 5 if weights.endswith("with offsets") else 4 + 48 / 128
    return 8 + 32 / 64 if weights.startswith("int8") else 16


def reader(folder: Path) -> Path:
    """The program that says how fast this machine reads its memory, compiled for it."""
    program = folder / "read-speed"
    source = Path(__file__).with_name("read_speed.c")
    subprocess.run(["cc", "-O3", "-march=native", "-pthread", str(source), "-o", str(program)], check=True)
    return program


def run(given: argparse.Namespace, model: Path, folder: Path) -> list[Choice]:
    """The choices as they were measured."""
    every, program = choices(given, model, folder), reader(folder)

    def turn(choice: Choice, up: Up, case: str) -> None:
        if case != CASES[0]:
            return asyncio.run(measure(choice, up, case))
        before = float(subprocess.check_output(program))
        asyncio.run(measure(choice, up, case))
        choice.machine.append((before + float(subprocess.check_output(program))) / 2)

    turns = [CASES[0]] * ALONE + [*CASES[1:]]
    with ExitStack() as stack:
        up = {} if given.apart else {choice.name: stack.enter_context(choice.start()) for choice in every}
        for number in range(given.rounds):
            if given.apart:
                for choice in every if number % 2 == 0 else every[::-1]:
                    with choice.start() as one:
                        for case in turns:
                            turn(choice, one, case)
            else:
                for place, case in enumerate(turns):
                    for choice in every if (number + place) % 2 == 0 else every[::-1]:
                        turn(choice, up[choice.name], case)
            print(f"round {number + 1} of {given.rounds}", file=sys.stderr)
    return every


def shares(choice: Choice, size: float) -> list[float]:
    """Weights of so many bytes a token: what part of the machine's own speed each turn of one stream read them at."""
    return [size / 1e6 / ms / speed for ms, speed in zip(choice.seen[CASES[0]], choice.machine, strict=True)]


def against(ours: Choice, theirs: Choice) -> str:
    """A row of ratios, by turns: at one stream and of first tokens times, at 16 streams tokens a second."""
    cells = []
    for case, seen in ours.seen.items():
        cells.append(cell([one / other for one, other in zip(seen, theirs.seen[case], strict=True)]))
    return f"| {ours.name} / {theirs.name} | {' | '.join(cells)} |"


def processor() -> str:
    facts = dict(
        re.findall(r"^(model name|cpu family|model)\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    )
    named = f"{facts.get('model name', 'unknown')} (family {facts.get('cpu family')}, model {facts.get('model')})"
    return f"{named}, {os.cpu_count()} cores"


def main() -> None:
    from serve.models.embedded import ensure

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--weights", nargs="*", default=["auto", "int8", "int4"])
    parser.add_argument(
        "--adapters", type=int, default=0, help="of rank 8, for loradock's servers; the streams take turns"
    )
    parser.add_argument("--model", type=Path)
    parser.add_argument("--size", choices=SIZES, help="random weights instead of the embedded model")
    parser.add_argument("--keep", type=Path, help="where the random model stays")
    parser.add_argument("--llama", type=Path, help="llama-server")
    parser.add_argument("--gguf", nargs="*", default=[], metavar="LABEL=FILE")
    parser.add_argument("--llama-lora", type=Path, help="llama.cpp's convert_lora_to_gguf.py")
    parser.add_argument("--against", type=Path, nargs="*", default=[], metavar="CHECKOUT")
    parser.add_argument("--apart", action="store_true")
    parser.add_argument("--kv-cache", default="1G", help="of each of loradock's servers")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = given.model or ensure("smollm2")
        if given.size:
            kept = given.keep or folder / given.size
            model = kept if kept.is_dir() else random_model(given.size, model, kept)
        every = run(given, model, folder)
        weights = {choice.name: bytes_read(model, choice.weights) for choice in every if not choice.llama}
    print(f"{given.size or model.name}, {given.adapters} adapters, {given.rounds} rounds, {processor()}\n")
    print(f"| | weights | {' | '.join(CASES)} | memory |\n|---|---|{'---|' * len(CASES)}---|")
    for choice in every:
        print(choice.row())
    if any(choice.compared for choice in every):
        print(f"\n| ratios of turns | {' | '.join(CASES)} |\n|---|{'---|' * len(CASES)}")
        for ours in every:
            for theirs in every:
                if theirs.compared and not ours.compared:
                    print(against(ours, theirs))
    machine = [speed for choice in every for speed in choice.machine]
    print(f"\nThe machine reads {median(machine):.1f} GB/s ({min(machine):.1f} to {max(machine):.1f}). At one stream:")
    for choice in every:
        if size := weights.get(choice.name):
            share = shares(choice, size)
            print(f"{choice.name}: {size / 1e6:.0f} MB of weights a token, of what the machine reads beside it "
                  f"{median(share):.0%} ({min(share):.0%} to {max(share):.0%})")  # fmt: skip


if __name__ == "__main__":
    main()
