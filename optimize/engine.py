"""The result in the engine that it is meant for: it loads, it answers, and how fast; the original beside it, run the
same way.

Each model runs in a process of its own, one after the other in turns, so that neither warms up the machine for the
other.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from optimize.errors import OptimizeError
from optimize.worker import Job, Progress

NEW_TOKENS = 64
ROUNDS = 3
STREAMS = (1, 16)
LENGTH = 1024


def run(job: Job, progress: Progress) -> dict[str, Any]:
    measured = {}
    prompts = list(job.evaluate.prompts)
    runs: list[tuple[str, str, dict[str, str]]] = [("original", job.reference, {}), ("result", job.model, {})]
    if job.adapters:
        runs.append(("adapters", job.model, job.adapters))
    for done, (name, folder, adapters) in enumerate(runs):
        progress(done, len(runs), f"the {name} in vLLM")
        measured[name] = _measured(name, folder, adapters, prompts)
    old, new = measured["original"], measured["result"]
    for prompt in prompts:
        if old["answers"][prompt].strip() and not new["answers"][prompt].strip():
            raise OptimizeError(f"the result answers {prompt!r} with nothing in vLLM, the original with something")
    scores: dict[str, Any] = {"engine": measured}
    for streams in map(str, STREAMS):
        scores[f"speed_{streams}"] = round(new["tokens_per_second"][streams] / old["tokens_per_second"][streams], 3)
    return {"scores": scores}


def _measured(name: str, folder: str, adapters: dict[str, str], prompts: list[str]) -> dict[str, Any]:
    """Figures and answers of one model in an engine of its own; with adapters, their answers alone."""
    asked = json.dumps({"model": folder, "adapters": adapters, "prompts": prompts})
    environ = {
        **os.environ, "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "optimize.engine"], input=asked, env=environ, capture_output=True, text=True, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        said = [line for line in done.stderr.splitlines() if "Error" in line][-1:] or done.stderr.splitlines()[-1:]
        print(done.stderr, file=sys.stderr)
        raise OptimizeError(f"the {name} does not run in vLLM: {''.join(said)[:400]}")
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def main() -> None:
    """In the process of one engine: the question on stdin, the figures on stdout."""
    asked = json.loads(sys.stdin.read())
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    adapters = asked["adapters"]
    lora = {"enable_lora": True, "max_loras": len(adapters), "max_lora_rank": _rank(adapters)} if adapters else {}
    start = time.monotonic()
    llm = LLM(
        asked["model"],
        max_model_len=LENGTH,
        max_num_seqs=max(STREAMS),
        max_num_batched_tokens=LENGTH,
        seed=0,
        disable_log_stats=True,
        **lora,
    )
    loaded = round(time.monotonic() - start, 1)
    greedy = SamplingParams(temperature=0, max_tokens=32)
    chat = llm.get_tokenizer().chat_template is not None

    def answer(prompt: str, adapter: Any = None) -> str:
        message: Any = [{"role": "user", "content": prompt}]
        ask = llm.chat if chat else llm.generate
        text: str = ask(message if chat else [prompt], greedy, use_tqdm=False, lora_request=adapter)[0].outputs[0].text
        return text

    if adapters:
        spoken = {
            name: {prompt: answer(prompt, LoRARequest(name, number, folder)) for prompt in asked["prompts"]}
            for number, (name, folder) in enumerate(sorted(adapters.items()), 1)
        }
        print(json.dumps({"load_seconds": loaded, "answers": spoken}))
        return
    answers = {prompt: answer(prompt) for prompt in asked["prompts"]}
    exactly = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, min_tokens=NEW_TOKENS, ignore_eos=True)
    speed: dict[str, list[float]] = {}
    for round_ in range(ROUNDS + 1):
        for streams in STREAMS:
            batch = [f"{round_} {at}. Write a story about a river and a town." for at in range(streams)]
            begun = time.monotonic()
            llm.generate(batch, exactly, use_tqdm=False)
            if round_:  # the first one compiles and warms up
                speed.setdefault(str(streams), []).append(streams * NEW_TOKENS / (time.monotonic() - begun))
    figures = {streams: round(median(found), 2) for streams, found in speed.items()}
    spread = {streams: [round(min(found), 2), round(max(found), 2)] for streams, found in speed.items()}
    print(json.dumps({"load_seconds": loaded, "answers": answers, "tokens_per_second": figures, "spread": spread}))


def _rank(adapters: dict[str, str]) -> int:
    """The smallest rank that vLLM allows and that holds every adapter."""
    ranks = [json.loads((Path(folder) / "adapter_config.json").read_text())["r"] for folder in adapters.values()]
    return next(size for size in (8, 16, 32, 64, 128, 256, 320, 512) if size >= max(ranks))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)
