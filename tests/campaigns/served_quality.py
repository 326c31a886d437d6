"""How good a model's weights are as the CPU step multiplies them: perplexity of held-out text, as served.

Each choice is an engine in a process of its own that scores the same windows of `optimize`'s held-out text: the model
with each `--cpu-weights`, and other checkpoints of it as they are.

    python -m tests.campaigns.served_quality [--windows 32] [--weights auto int8 int4] [--also DIR ...] [--model DIR]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import mean
from typing import Any

TOKENS = 512


@dataclass(frozen=True, slots=True)
class Scored:
    """One choice's windows: each token's log-probability, and which one was likeliest."""

    weights: str
    seconds: float
    likely: list[list[float]]
    first: list[list[int]]

    @property
    def perplexity(self) -> float:
        return math.exp(-mean(value for window in self.likely for value in window))

    def agreement(self, other: Scored) -> float:
        """Share of places with the same likeliest token."""
        pairs = zip(chain(*self.first), chain(*other.first), strict=True)
        return mean(one == two for one, two in pairs)


def score(model: Path, windows: int, out: Path) -> None:
    """In a process of its own: one engine, its answers written as JSON."""
    import time

    from serve.models.hardware import cpu_environment
    from serve.server.launch import IN_PROCESS

    os.environ.update(cpu_environment(os.environ, together=True))
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams, TokensPrompt

    from optimize.checkpoint.model import tokenizer
    from optimize.data import text

    ids = text.windows(tokenizer(model), text.default()["evaluation"], windows, TOKENS, 0)
    llm: Any = LLM(
        str(model),
        max_model_len=TOKENS + 1,
        max_num_batched_tokens=TOKENS,
        kv_cache_memory_bytes=1 << 28,
        enable_lora=True,
        max_lora_rank=8,
        enable_prefix_caching=False,
        distributed_executor_backend=IN_PROCESS,
    )
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1, detokenize=False)
    began = time.monotonic()
    answers = llm.generate([TokensPrompt(prompt_token_ids=window) for window in ids], params, use_tqdm=False)
    seconds = time.monotonic() - began
    likely, first = [], []
    for window, answer in zip(ids, answers, strict=True):
        rows = list(zip(window[1:], answer.prompt_logprobs[1:], strict=True))
        likely.append([row[token].logprob for token, row in rows])
        first.append([next(token for token, value in row.items() if value.rank == 1) for _, row in rows])
    (runner,) = llm.collective_rpc(lambda worker: worker.model_runner)
    fused = getattr(runner, "loradock_fused", None)
    weights = fused.weights if fused else "in vLLM's layers"
    out.write_text(json.dumps({"weights": weights, "seconds": seconds, "likely": likely, "first": first}))


def scored(model: Path, weights: str, windows: int) -> Scored:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.json")
        command = [sys.executable, "-m", "tests.campaigns.served_quality", "--score", str(out), "--model", str(model)]
        command += ["--windows", str(windows)]
        environ = {**os.environ, "LORADOCK_CPU_WEIGHTS": weights, "LORADOCK_LORA_KERNELS": "auto"}
        environ["PYTHONPATH"] = str(Path(__file__).parents[2])
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[-4000:])
        return Scored(**json.loads(out.read_text()))


def main() -> None:
    from serve.models.embedded import ensure

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--windows", type=int, default=32, help=f"of {TOKENS} tokens")
    parser.add_argument("--weights", nargs="*", default=["auto", "int8", "int4"])
    parser.add_argument("--also", nargs="*", type=Path, default=[], help="checkpoints that are served as they are")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--score", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    model = given.model or ensure("smollm2")
    if given.score:
        score(model, given.windows, given.score)
        return
    print("| | weights | perplexity | same likeliest token |\n|---|---|---|---|", flush=True)
    base: Scored | None = None
    for folder, weights in [*((model, each) for each in given.weights), *((each, "auto") for each in given.also)]:
        now = scored(folder, weights, given.windows)
        base = base or now
        name = f"`--cpu-weights {weights}`" if folder == model else folder.name
        more = f", {now.perplexity / base.perplexity - 1:+.1%}" if now is not base else ""
        print(f"| {name} | {now.weights} | {now.perplexity:.2f}{more} | {now.agreement(base):.1%} |", flush=True)


if __name__ == "__main__":
    main()
