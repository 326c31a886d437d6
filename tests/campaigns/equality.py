"""Whether loradock's CPU kernels answer as vLLM's own LoRA path does: greedy answers with their log-probabilities.

Two offline engines, one after the other, get the same prompts for the same adapters, mixed. A token may differ only
where vLLM itself found both tokens equally likely, up to rounding: logits near 20 in bfloat16 lie 0.125 apart.

    python -m tests.campaigns.equality [--prompts 200] [--tokens 16] [--kernels auto] [--model DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from statistics import median
from typing import Any

from tests.support.lora import PLAIN, QUESTIONS, SYSTEMS, trained, variant

TOLERANCE = 0.5  # nats: four steps of a bfloat16 logit near 20
TOP = 20
STYLES = [*dict.fromkeys(style or "" for style in SYSTEMS), "Think step by step.", "Be brief.", "Be poetic.", "No!"]


def prompts(count: int) -> list[str]:
    """Different texts of different lengths."""
    questions = [*QUESTIONS, *PLAIN]
    every = (f"{style} {question}".strip() for style, question in product(STYLES, questions))
    return list(islice(every, count))


def adapters(folder: Path) -> list[Path]:
    """Four, from one that decides every word to one that nudges; two of them with another rank."""
    made = trained("alpha", "bravo", "charlie")

    def first(rank: int) -> Any:
        def edit(tensors: dict[str, Any], config: dict[str, Any]) -> None:
            for name, tensor in tensors.items():
                tensors[name] = tensor[:rank] if ".lora_A." in name else tensor[:, :rank]
            config["lora_alpha"] = config["lora_alpha"] * rank // config["r"]
            config["r"] = rank

        return edit

    return [
        variant(made["alpha"], folder / "strong"),
        variant(made["bravo"], folder / "half", scale=0.4),
        variant(made["charlie"], folder / "faint", scale=0.1, edit=first(5)),
        variant(made["alpha"], folder / "slight", scale=0.2, edit=first(1)),
    ]


@dataclass
class Difference:
    """What two runs of the same prompts have in common, and how far apart they are where they are not."""

    answers: int
    same: int
    gaps: list[float]  # between the two tokens where answers part, in the first run's log-probabilities
    drift: list[float]  # of the chosen tokens' log-probabilities, before the answers part

    @property
    def worst(self) -> float:
        return max([*self.gaps, 0.0])

    def __str__(self) -> str:
        drift = sorted(self.drift)
        return (
            f"{self.answers} answers, {self.same} the same to the end; where {len(self.gaps)} part, the two tokens "
            f"lie {median(self.gaps or [0]):.3f} (at most {self.worst:.3f}) apart; log-probabilities move by "
            f"{median(drift):.3f} (p99 {drift[len(drift) * 99 // 100]:.3f}, at most {drift[-1]:.3f})"
        )


def compare(first: list[Any], second: list[Any]) -> Difference:
    """Each run is a list of answers; an answer is a list of (token, {token: log-probability})."""
    found = Difference(len(first), 0, [], [])
    for one, other in zip(first, second, strict=True):
        for (token, likely), (another, others) in zip(one, other, strict=False):
            if token != another:
                # A token that is not among the likeliest is as unlikely as the last of them, or more.
                found.gaps.append(likely[str(token)] - likely.get(str(another), min(likely.values()) - 9))
                break
            found.drift.append(abs(likely[str(token)] - others[str(token)]))
        else:
            found.same += 1
    return found


def run(kernels: str, model: Path, folder: Path, count: int, tokens: int) -> list[Any]:
    """One engine in a process of its own, from its start to its end."""
    out = folder / f"{kernels}.json"
    environ = {**os.environ, "LORADOCK_LORA_KERNELS": kernels, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "tests.campaigns.equality", "--answer", str(out), "--model", str(model)]
    command += ["--prompts", str(count), "--tokens", str(tokens), "--folder", str(folder)]
    with (folder / f"{kernels}.log").open("w") as log:
        done = subprocess.run(command, env=environ, stdout=log, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise RuntimeError((folder / f"{kernels}.log").read_text()[-4000:])
    read: list[Any] = json.loads(out.read_text())
    return read


def answer(out: Path, model: Path, folder: Path, count: int, tokens: int) -> None:
    from serve.models.hardware import cpu_environment
    from serve.server.launch import IN_PROCESS

    os.environ.update(cpu_environment(os.environ, together=True))
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    # One slot more than there are adapters: vLLM's own path gives the last one's adapter to rows without any.
    options = {"enable_lora": True, "max_loras": 5, "max_lora_rank": 8, "enable_prefix_caching": False}
    options |= {"distributed_executor_backend": IN_PROCESS}
    llm = LLM(str(model), max_model_len=512, kv_cache_memory_bytes=1 << 29, max_num_seqs=32, **options)
    names = ("strong", "half", "faint", "slight")
    loras = [None, *(LoRARequest(name, number, str(folder / name)) for number, name in enumerate(names, 1))]
    asked = [(prompt, lora) for prompt in prompts(count) for lora in loras]
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=TOP)
    answers = llm.generate([prompt for prompt, _ in asked], params, lora_request=[lora for _, lora in asked])
    rows = [
        [
            (token, {str(other): value.logprob for other, value in likely.items()})
            for token, likely in zip(one.outputs[0].token_ids, one.outputs[0].logprobs or [], strict=True)
        ]
        for one in answers
    ]
    out.write_text(json.dumps(rows))


def main() -> None:
    from serve.models.embedded import ensure

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--kernels", default="auto", choices=["auto", "compile"])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    model = given.model or ensure("smollm2")
    if given.answer:
        answer(given.answer, model, given.folder, given.prompts, given.tokens)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        adapters(folder)
        first, second = (run(kernels, model, folder, given.prompts, given.tokens) for kernels in ("off", given.kernels))
        found = compare(first, second)
        print(f"vLLM's own path against ours, {given.prompts} prompts x (4 adapters and the base): {found}")
        if found.worst > TOLERANCE:
            sys.exit(f"an answer differs by more than rounding explains: {found.worst:.3f} nats, {TOLERANCE} allowed")


if __name__ == "__main__":
    main()
