"""What is lost between an engine's step and the socket: the engine in one process against the server, in turns.

    python -m tests.campaigns.socket_cost [ROUNDS]

Both have the same settings, prompts of the same length and the same adapters. Prints tokens a second and their ratio,
at 16 streams over 16 adapters, at one stream with one adapter, and of the base alone.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CASES = ((16, 64, 16), (16, 64, 0), (1, 6, 1), (1, 6, 0))  # streams, requests, adapters (0: the base)
TOKENS, WORDS, SEATS = 64, 91, 32
SETTINGS = {"max_loras": 16, "max_lora_rank": 16, "max_model_len": 2048, "kv_cache_memory_bytes": 1 << 30}


def engine(folder: Path) -> None:
    """The engine in this process; a case comes in a line of stdin, its tokens a second go out in one."""
    from serve.models.embedded import ensure
    from serve.server.launch import IN_PROCESS

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    from serve.client.bench.prompts import Prompts

    prompts, params = Prompts(0), SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    llm = LLM(
        str(ensure("smollm2")),
        enable_lora=True,
        max_num_seqs=SEATS,
        distributed_executor_backend=IN_PROCESS,
        **SETTINGS,  # type: ignore[arg-type]
    )
    scheduler: Any = llm.llm_engine.engine_core.engine_core.scheduler  # type: ignore[attr-defined]

    def run(streams: int, requests: int, adapters: int) -> float:
        scheduler.max_num_active_reqs = streams
        numbers = [index % adapters + 1 if adapters else 0 for index in range(requests)]
        loras = [LoRARequest(f"a{n}", n, str(folder / f"a{n}")) if n else None for n in numbers]
        texts = [prompts.text("offline", prompts.run, index, WORDS) for index in range(requests)]
        prompts.run = os.urandom(8).hex()
        began = time.perf_counter()
        llm.chat([[{"role": "user", "content": text}] for text in texts], params, lora_request=loras, use_tqdm=False)
        return requests * TOKENS / (time.perf_counter() - began)

    for case in ((16, 16, 16), (16, 16, 0), (1, 1, 1)):
        run(*case)
    print("ready", flush=True)
    for line in sys.stdin:
        print(f"tokens/s {run(*map(int, line.split()))}", flush=True)


def main(rounds: int) -> None:
    from serve.models.hardware import cpu_environment
    from tests.e2e.test_tiers import random_adapter
    from tests.support.server import Server, environment

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in range(1, 17):
            random_adapter(folder / f"a{number}", number)
        settings = [word for key, value in SETTINGS.items() for word in (f"--{key.replace('_', '-')}", str(value))]
        environ = environment() | cpu_environment(os.environ, together=True)
        command = [sys.executable, "-m", "tests.campaigns.socket_cost", "engine", str(folder)]
        with (
            Server(folder / "data", folder / "log", *settings) as server,
            subprocess.Popen(command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as offline,
        ):
            for number in range(1, 17):
                server.upload(f"a{number}", folder / f"a{number}").raise_for_status()
            try:
                said(offline, "ready")
                found: dict[tuple[int, int, int], list[tuple[float, float]]] = {case: [] for case in CASES}
                for number in range(rounds):
                    for case in CASES:
                        if number % 2 == 0:
                            alone = ask(offline, case)
                            http = load(server.url, case)
                        else:
                            http = load(server.url, case)
                            alone = ask(offline, case)
                        found[case].append((alone, http))
                        report(case, found[case])
            finally:
                offline.kill()


def said(process: subprocess.Popen[str], begin: str) -> str:
    """What follows `begin` in the next line that begins so; vLLM says much between."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(begin):
            return line.removeprefix(begin)
    raise RuntimeError("the engine stopped: its log above says why")


def ask(process: subprocess.Popen[str], case: tuple[int, int, int]) -> float:
    assert process.stdin is not None
    print(*case, file=process.stdin, flush=True)
    return float(said(process, "tokens/s"))


def load(url: str, case: tuple[int, int, int]) -> float:
    """Tokens a second of one round of loradock bench."""
    streams, requests, adapters = case
    words = ["--url", url, "--streams", str(streams), "--requests", str(requests), "--max-tokens", str(TOKENS)]
    words += ["--ignore-eos", "--rounds", "1", "--reruns", "0", "--json", "-"]
    words += ["--adapters", ",".join(f"a{n}" for n in range(1, adapters + 1))] if adapters else ["--model", "smollm2"]
    command = [sys.executable, "-m", "serve.cli", "bench", *words]
    done = subprocess.run(command, capture_output=True, check=True)
    return float(json.loads(done.stdout)["summary"]["levels"][0]["servers"]["A"]["figures"]["output_tok_s"])


def report(case: tuple[int, int, int], pairs: list[tuple[float, float]]) -> None:
    streams, _, adapters = case
    offline, http = pairs[-1]
    ratios = [one / other for other, one in pairs]
    print(
        f"{streams} streams, {adapters or 'no'} adapters: {http:.0f} tokens/s over HTTP, {offline:.0f} in one process; "
        f"{statistics.median(ratios):.3f} in the median of {len(ratios)}, {min(ratios):.3f} to {max(ratios):.3f}",
        flush=True,
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["engine"]:
        engine(Path(sys.argv[2]))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
