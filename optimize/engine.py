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
    for done, (name, folder) in enumerate((("original", job.reference), ("result", job.model))):
        progress(done, 2, f"the {name} in vLLM")
        adapters = {} if name == "original" else job.adapters
        measured[name] = _measured(name, folder, adapters, list(job.evaluate.prompts))
    old, new = measured["original"], measured["result"]
    scores: dict[str, Any] = {"engine": measured}
    for streams in STREAMS:
        scores[f"speed_{streams}"] = round(
            new["tokens_per_second"][str(streams)] / old["tokens_per_second"][str(streams)], 3
        )
    return {"scores": scores}


def _measured(name: str, folder: str, adapters: dict[str, str], prompts: list[str]) -> dict[str, Any]:
    asked = json.dumps({"model": folder, "adapters": adapters, "prompts": prompts})
    environ = {
        **os.environ, "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_USE_V1": "1",
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
    if empty := [prompt for prompt, answer in found["answers"].items() if not answer.strip()]:
        raise OptimizeError(f"the {name} answers {empty[0]!r} with nothing in vLLM")
    return found


def main() -> None:
    """In the process of one engine: the question on stdin, the figures on stdout."""
    asked = json.loads(sys.stdin.read())
    from vllm import LLM, SamplingParams

    start = time.monotonic()
    llm = LLM(
        asked["model"],
        max_model_len=LENGTH,
        max_num_seqs=16,
        max_num_batched_tokens=LENGTH,
        seed=0,
        disable_log_stats=True,
    )
    loaded = time.monotonic() - start
    greedy = SamplingParams(temperature=0, max_tokens=32)
    chat = llm.get_tokenizer().chat_template is not None
    answers = {}
    for prompt in asked["prompts"]:
        if chat:
            said = llm.chat([{"role": "user", "content": prompt}], greedy, use_tqdm=False)
        else:
            said = llm.generate([prompt], greedy, use_tqdm=False)
        answers[prompt] = said[0].outputs[0].text
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
    print(
        json.dumps(
            {"load_seconds": round(loaded, 1), "answers": answers, "tokens_per_second": figures, "spread": spread}
        )
    )


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)
