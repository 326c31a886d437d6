"""`make four-bits`: what methods of rounding weights to 4 bits leave of a model, with llama.cpp's formats beside them.

Each method makes a checkpoint from the same bfloat16 model, calibrated on the same text, and answers the same windows
of held-out text. Perplexity, the KL divergence from the original in nats a token, and the share of places with the same
likeliest token are `loradock optimize`'s own measurement. Ours are computed by PyTorch as the engine computes them,
`llama.cpp` rows by its library. Bits are those of a weight of a layer, scales included.

    python -m tests.campaigns.four_bits [--model DIR] [--windows 8] [--calibration 16] [--rescaled] [--only ROW ...]
        [--llama LLAMA.CPP] [--auto-round PYTHON] [--llm-compressor PYTHON] [--seed 0] [--finished FILE.jsonl]

`GGUF` rows are files that `loradock optimize` writes, by what their weights are. LLAMA.CPP is its source, built in
`build` with shared libraries: targets llama-quantize and llama-imatrix, which begin with such a file in BF16. PYTHON
has the package auto-round, or llmcompressor, which gets the same calibration windows; the seed draws these, and the
package's own lots. `make small-llama` trains a model whose weights were never on a grid. `--rescaled` is for the
embedded one, whose weights were llama.cpp's Q4_1 once: whatever has an offset for each 32 weights gets back what they
were. Every channel that a layer makes and another reads is multiplied by a random factor of 0.7 to 1.4 and divided by
it again where it is read, so that the model computes the same with weights that lie on no grid.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch

from optimize.checkpoint.checkpoint import Checkpoint
from optimize.checkpoint.model import logits, opened, settle, tokenizer
from optimize.data import text
from optimize.evaluation.evaluate import Ask, compared
from optimize.export import gguf_file
from optimize.job import Job, Progress
from optimize.options import Evaluate, Text
from optimize.steps.kind import kinds
from optimize.steps.quantize import quantize
from serve.models.embedded import ensure
from tests.campaigns.cpu_speed import processor

TOKENS = 512
ROOT = Path(__file__).parents[2]
W4 = {"scheme": "w4a16"}
GPTQ, AWQ_GPTQ = W4 | {"method": "gptq"}, W4 | {"method": "awq-gptq"}
# A row of the table -> what `quantize` is told.
OURS: dict[str, dict[str, Any]] = {
    "to the nearest, g64": W4 | {"method": "rtn", "group": 64},
    "to the nearest, g32": W4 | {"method": "rtn", "group": 32},
    "AWQ, g32": W4 | {"method": "awq", "group": 32},
    "AWQ, g64": W4 | {"method": "awq", "group": 64},
    "GPTQ, g64": GPTQ | {"group": 64},
    "GPTAQ, g64": W4 | {"method": "gptaq", "group": 64},
    "AWQ and GPTQ, g64": AWQ_GPTQ | {"group": 64},
    "AWQ and GPTQ, g32": AWQ_GPTQ | {"group": 32},
    "GPTQ, g32": GPTQ | {"group": 32},
    "GPTQ, g64, some layers 8 bits: `bits: 4.5`": GPTQ | {"group": 64, "bits": 4.5},
}
# What the export of a GGUF file is told.
FILES = {
    f"GGUF {precision}, {method}": {"precision": precision, "method": method}
    for precision in ("q4_0", "q4_k_m", "q6_k")
    for method in ("nearest", "gptq")
}
LLAMA = ("BF16", "Q4_0", "Q4_1", "IQ4_XS", "Q4_K_M")
WEIGHED = ("IQ4_XS", "Q4_K_M")  # also with llama.cpp's importance matrix
Maker = Callable[[], tuple[Any, dict[str, Any]]]
LINEARS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


class Drawn(NamedTuple):
    """So many windows of the calibration text, by that seed."""

    windows: int
    seed: int


class Rows:
    """The table, a row at a time; a row in the file `finished` is not measured again."""

    def __init__(self, finished: Path | None, windows: list[torch.Tensor], reference: list[torch.Tensor]) -> None:
        self.finished, self.windows, self.reference = finished, windows, reference
        self.done: dict[str, dict[str, Any]] = {}
        if finished and finished.is_file():
            self.done = {row["name"]: row for row in map(json.loads, finished.read_text().splitlines())}

    def row(self, name: str, made: Maker) -> None:
        """`made` is a context that gives something to ask, and what is said of the model."""
        if name not in self.done:
            context, facts = made()
            with context as ask:
                scores = compared(self.reference, map(ask, self.windows), self.windows, lambda _: None)
            self.done[name] = {"name": name, **facts, **scores}
            if self.finished:
                with self.finished.open("a") as out:
                    out.write(json.dumps(self.done[name]) + "\n")
        shown(self.done[name])


def shown(row: dict[str, Any]) -> None:
    perplexity = f"{row['perplexity']:.2f}, {row['perplexity_increase']:+.1%}"
    cells = [f"{row['bits']:.2f}", row["head"], f"{row['bytes'] / 1e6:.0f}", perplexity, f"{row['kl']:.4f}"]
    cells += [f"{row['top1']:.1%}", f"{row['seconds']:.0f}" if "seconds" in row else ""]
    print(f"| {row['name']} | {' | '.join(cells)} |", flush=True)


@contextmanager
def pytorch(folder: Path) -> Iterator[Ask]:
    yield partial(logits, opened(folder))


@contextmanager
def process(*command: str | Path, **more: str) -> Iterator[Ask]:
    """A program that reads windows of token ids and writes their logits, as llama_logits.cpp does."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT), **more}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ) as program:
        assert program.stdin and program.stdout

        def ask(row: torch.Tensor) -> torch.Tensor:
            assert program.stdin and program.stdout
            program.stdin.write(row.to(torch.int32).numpy().tobytes())
            program.stdin.flush()
            said = program.stdout.read(row.numel() * vocabulary * 4)
            if len(said) < row.numel() * vocabulary * 4:
                raise SystemExit(f"{' '.join(map(str, command))} answered nothing")
            return torch.from_numpy(np.frombuffer(bytearray(said), np.float32)).view(1, -1, vocabulary)

        vocabulary = int(more["VOCABULARY"])
        yield ask
        program.stdin.close()


def quantized(model: Path, options: dict[str, Any], calibration: Drawn, folder: Path) -> tuple[Any, dict[str, Any]]:
    options = msgspec.to_builtins(kinds()["quantize"].options(**options))
    seconds = _run("quantize", quantize.run, model, options, calibration, folder)
    return pytorch(folder / "model"), {**facts(folder / "model"), "seconds": seconds}


def filed(model: Path, options: dict[str, Any], calibration: Drawn, folder: Path) -> tuple[Any, dict[str, Any]]:
    seconds = _run("gguf", gguf_file.run, model, options, calibration, folder)
    return pytorch(folder / "dense"), {**file_facts(folder / "model" / gguf_file.FILE), "seconds": seconds}


def foreign(
    script: str, python: Path, model: Path, calibration: list[list[int]], how: tuple[Any, ...], folder: Path
) -> tuple[Any, dict[str, Any]]:
    """A checkpoint that another package makes, in an environment of its own."""
    folder.mkdir()
    windows, out = folder / "windows.json", folder / "model"
    windows.write_text(json.dumps(calibration))
    command = [python, Path(__file__).with_name(script), model, windows, out, *how]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, env=_alone())
    if done.returncode:
        raise SystemExit(f"{script} failed: {done.stderr[-2000:]}")
    made = next(file.parent for file in sorted(out.rglob("config.json")))
    return pytorch(made), {**facts(made), "seconds": float(done.stdout.splitlines()[-1])}


def _alone() -> dict[str, str]:
    """The environment without this project's packages."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def _run(
    kind: str,
    step: Callable[[Job, Progress], Any],
    model: Path,
    options: dict[str, Any],
    calibration: Drawn,
    folder: Path,
) -> float:
    """Processor seconds."""
    job = Job(
        kind=kind, options=options,
        model=str(model), base=str(model), reference=str(model), adapters={}, originals={},
        calibration=Text(samples=calibration.windows, tokens=TOKENS),
        evaluate=Evaluate(), seed=calibration.seed, target="cpu", out=str(folder),
    )  # fmt: skip
    folder.mkdir()
    begun, cpu = time.monotonic(), time.process_time()
    step(job, Progress(lambda _: None))
    seconds = time.process_time() - cpu
    print(f"{folder.name}: {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    return seconds


def facts(folder: Path) -> dict[str, Any]:
    """What a checkpoint's file says: bits of a weight of a layer, of the output layer, and bytes."""
    taken = {name: entry.bytes for name, entry in Checkpoint(folder).entries.items() if "_proj." in name}
    bits = 8 * sum(size for name, size in taken.items() if not name.endswith("weight_shape"))
    return {"bits": bits / weights(folder), "head": "bf16", "bytes": Checkpoint(folder).bytes}


def file_facts(file: Path) -> dict[str, Any]:
    """The same of a GGUF file."""
    from gguf import GGUFReader

    tensors = {tensor.name: tensor for tensor in GGUFReader(str(file)).tensors}
    layers = [t for name, t in tensors.items() if name.startswith("blk.") and name.split(".")[2] in LINEARS]
    bits = 8 * sum(int(t.n_bytes) for t in layers) / sum(int(t.n_elements) for t in layers)
    head = tensors.get("output.weight", tensors["token_embd.weight"]).tensor_type.name
    return {"bits": bits, "head": head, "bytes": sum(int(t.n_bytes) for t in tensors.values())}


def weights(folder: Path) -> int:
    """How many the linear layers have."""
    config = Checkpoint(folder).config
    hidden, inner, layers = (int(config[key]) for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    head = int(config.get("head_dim") or hidden // config["num_attention_heads"])
    heads = head * (2 * config["num_attention_heads"] + 2 * config["num_key_value_heads"])
    return layers * hidden * (heads + 3 * inner)


class Llama:
    """llama.cpp's tools over one model."""

    def __init__(self, source: Path, model: Path, calibration: list[list[int]], folder: Path) -> None:
        self.folder, self.bin, self.vocabulary = (
            folder,
            source / "build" / "bin",
            Checkpoint(model).config["vocab_size"],
        )
        self.program = folder / "llama_logits"
        code = Path(__file__).with_name("llama_logits.cpp")
        headers = [f"-I{source / part}" for part in ("include", "ggml/include")]
        libraries = [f"-L{self.bin}", f"-Wl,-rpath,{self.bin}", "-lllama", "-lggml", "-lggml-base"]
        self._run("c++", "-O2", "-std=c++17", *headers, str(code), *libraries, "-o", str(self.program))
        _run("gguf", gguf_file.run, model, {"precision": "bf16"}, Drawn(1, 0), folder / "BF16")
        self.whole = folder / "BF16" / "model" / gguf_file.FILE
        self.text = folder / "calibration.txt"
        self.text.write_text("".join(tokenizer(model).decode(window) for window in calibration))
        self.matrix = folder / "importance.gguf"

    def quantized(self, kind: str, weighed: bool) -> tuple[Any, dict[str, Any]]:
        file, took = self.whole, {}
        if kind != "BF16":
            file = self.folder / f"{kind}.gguf"
            begun = os.times()
            if weighed and not self.matrix.is_file():
                given = ("-m", self.whole, "-f", self.text, "-o", self.matrix, "-c", TOKENS, "-b", TOKENS)
                self._run(*map(str, (self.bin / "llama-imatrix", *given)))
            options = ("--imatrix", self.matrix) if weighed else ()
            self._run(*map(str, (self.bin / "llama-quantize", *options, self.whole, file, kind)))
            spent = os.times()
            took = {"seconds": spent[2] + spent[3] - begun[2] - begun[3]}  # of processors, by children
        command = self.program, file, str(TOKENS), str(torch.get_num_threads())
        return process(*command, VOCABULARY=str(self.vocabulary)), {**file_facts(file), **took}

    def _run(self, *command: str, **more: str) -> None:
        done = subprocess.run(command, env={**os.environ, **more}, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed: {done.stderr[-2000:]}")


def rescaled(model: Path, folder: Path) -> Path:
    """The same function with other weights, in bfloat16: the docstring above says why."""
    from transformers import AutoModelForCausalLM

    whole: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    dice = torch.Generator().manual_seed(0)

    def factors(channels: int) -> torch.Tensor:
        return 2 ** (torch.rand(channels, generator=dice) - 0.5)

    with torch.no_grad():
        for layer in whole.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            queries = attention.q_proj, attention.k_proj, attention.v_proj
            for norm, readers in (
                (layer.input_layernorm, queries),
                (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                by = factors(len(norm.weight))
                norm.weight /= by
                for reader in readers:
                    reader.weight *= by
            by = factors(mlp.up_proj.out_features)
            mlp.up_proj.weight /= by[:, None]
            mlp.down_proj.weight *= by
            by = factors(attention.v_proj.out_features)
            attention.v_proj.weight /= by[:, None]
            several = attention.q_proj.out_features // attention.v_proj.out_features
            attention.o_proj.weight *= by.view(-1, attention.head_dim).repeat_interleave(several, 0).flatten()
    whole.bfloat16().save_pretrained(folder)
    tokenizer(model).save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--windows", type=int, default=8, help=f"of {TOKENS} tokens, held out")
    parser.add_argument("--calibration", type=int, default=16, help=f"windows of {TOKENS} tokens")
    parser.add_argument("--model", type=Path, help="a checkpoint in bfloat16; the embedded model otherwise")
    parser.add_argument("--rescaled", action="store_true", help="the embedded model with weights on no grid")
    parser.add_argument("--only", nargs="*", default=[], help="rows of these names, or that begin so, in this order")
    parser.add_argument("--llama", type=Path, help="llama.cpp's source, built")
    parser.add_argument("--auto-round", type=Path, help="a Python that has auto-round")
    parser.add_argument("--llm-compressor", type=Path, help="a Python that has llmcompressor")
    parser.add_argument("--seed", type=int, default=0, help="of the calibration windows")
    parser.add_argument("--finished", type=Path, help="rows that are done, a JSON line each")
    given = parser.parse_args()
    settle(0)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = given.model or ensure("smollm2")
        model = rescaled(model, folder / "rescaled") if given.rescaled else model
        words, texts = tokenizer(model), text.default()
        windows = list(torch.tensor(text.windows(words, texts["evaluation"], given.windows, TOKENS, 0)).split(1))
        calibration = text.windows(words, texts["calibration"], given.calibration, TOKENS, given.seed)
        drawn = Drawn(given.calibration, given.seed)
        ask = partial(logits, opened(model))
        rows = Rows(given.finished, windows, [ask(row) for row in windows])
        named = (given.model.name if given.model else "the embedded model") + ", rescaled" * given.rescaled
        print(f"{named}; {processor()}; {datetime.now():%Y-%m-%d}", end="; ")
        print(f"{given.windows} windows of {TOKENS} tokens, calibrated on {given.calibration}\n")
        print("| | bits a weight | output layer | MB | perplexity | KL | same likeliest | s |")
        print(f"|{'---|' * 8}", flush=True)

        again = iter(rows.reference)
        makers: dict[str, Maker] = {
            "bfloat16": lambda: (nullcontext(lambda _: next(again)), facts(model)),
            **{
                name: partial(quantized, model, options, drawn, folder / str(at))
                for at, (name, options) in enumerate(OURS.items())
            },
            **{
                name: partial(filed, model, options, drawn, folder / f"file-{at}")
                for at, (name, options) in enumerate(FILES.items())
            },
        }
        if given.llama:
            llama = Llama(given.llama, model, calibration, folder)
            makers |= {f"llama.cpp {kind}": partial(llama.quantized, kind, False) for kind in LLAMA}
            makers |= {f"llama.cpp {kind}, importance": partial(llama.quantized, kind, True) for kind in WEIGHED}
        others = {
            "AutoRound, g{}, 200 iterations": ("auto_round_library.py", given.auto_round, 200),
            "llm-compressor GPTQ, g{}, mse": ("llm_compressor_library.py", given.llm_compressor, "memoryless_mse"),
            "llm-compressor GPTQ, g{}": ("llm_compressor_library.py", given.llm_compressor, "memoryless_minmax"),
        }
        for title, (script, python, option) in others.items():
            for group in (32, 64) if python else ():
                name, how = title.format(group), (group, option, given.seed)
                makers[name] = partial(
                    foreign, script, python, model, calibration, how, folder / f"{len(makers)}-other"
                )
        chosen: list[str] = []
        for wish in given.only:
            chosen += [wish] if wish in makers else [name for name in makers if name.startswith(wish)]
        for name in dict.fromkeys(chosen if given.only else makers):
            rows.row(name, makers[name])


if __name__ == "__main__":
    main()
