"""Load the result and the original in vLLM, ask both, and measure their quality and speed there.

Both run as `loradock serve` runs a model: with adapters enabled, and on a CPU in one process, bound to its cores.
Quality is the log-probability that vLLM gives each token of the held-out text.

Each model has a process of its own. On a CPU both are loaded and warm before anything is timed, and then take turns,
original, result, result, original, so that other load on the machine slows both; the ratio is the median over the
pairs. On a GPU each wants nearly all of its memory, so they run one after the other, whatever the target is. The option
`timed: false` leaves the speeds out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from optimize import audio_packages, processor
from optimize.checkpoint.checkpoint import adapter_config
from optimize.errors import OptimizeError
from optimize.evaluation.held_out import held_out
from optimize.evaluation.perplexity import increase, perplexity
from optimize.job import Job, Progress

if TYPE_CHECKING:
    import torch

NEW_TOKENS = 64
ROUNDS = 25
STREAMS = (1, 16)
CALM = 0.05  # seconds until the threads of the engine that had its turn no longer spin
LENGTH = 1024
IN_PROCESS = "vllm.v1.executor.uniproc_executor.UniProcExecutor"


def run(job: Job, progress: Progress) -> dict[str, Any]:
    text = held_out(job)
    timed = job.options.get("timed", True)
    length = max(LENGTH, *(row.shape[1] + 1 for row in [*text.original, *text.result]))
    engines = (
        partial(Engine, "original", job.reference, {}, job.target, length),
        partial(Engine, "result", job.model, job.adapters, job.target, length),
    )
    asked = (text.original, text.result)
    speeds: dict[int, list[tuple[float, float]]] = {}
    tell = partial(progress, total=ROUNDS * len(STREAMS), what="tokens/s")
    progress(0, 2, "the original in vLLM")
    if processor.gpu() is not None or job.target == "gpu":
        with engines[0]() as original:
            old = _answers(original, job, asked[0])
            before = {streams: _timed(original, streams) for streams in STREAMS if timed}
        progress(1, 2, "the result in vLLM")
        with engines[1]() as result:
            new = _answers(result, job, asked[1])
            speeds = {
                streams: list(zip(rates, _timed(result, streams), strict=True)) for streams, rates in before.items()
            }
    else:
        with engines[0]() as original:
            old = _answers(original, job, asked[0])
            progress(1, 2, "the result in vLLM")
            with engines[1]() as result:
                new = _answers(result, job, asked[1])
                for done, streams in enumerate(STREAMS if timed else ()):
                    speeds[streams] = _raced(original, result, streams, tell, done * ROUNDS)
    for prompt in job.evaluate.prompts:
        if old["answers"][prompt].strip() and not new["answers"][prompt].strip():
            raise OptimizeError(f"the result answers {prompt!r} with nothing in vLLM, the original with something")
    return {"scores": _scores(job, old, new, speeds, text.kept is None)}


def _answers(engine: Engine, job: Job, rows: list[torch.Tensor]) -> dict[str, Any]:
    """What the engine answers the prompts, and what it thinks of each token of the text."""
    answers = engine.ask({"answer": list(job.evaluate.prompts)})
    return answers | engine.ask({"text": [row[0].tolist() for row in rows]})


def _scores(
    job: Job, old: dict[str, Any], new: dict[str, Any], speeds: dict[int, list[tuple[float, float]]], same_tokens: bool
) -> dict[str, Any]:
    scores: dict[str, Any] = {"engine": {"original": old, "result": new}, "engine_log_perplexity": new["loss"]}
    likeliest = [engine.pop("likeliest") for engine in (old, new)]
    if same_tokens:
        pairs = [pair for rows in zip(*likeliest, strict=True) for pair in zip(*rows, strict=True)]
        scores |= {
            "engine_perplexity_original": perplexity(old["loss"]),
            "engine_perplexity": perplexity(new["loss"]),
            "engine_perplexity_increase": increase(new["loss"] - old["loss"]),
            "engine_top1": round(sum(one == other for one, other in pairs) / len(pairs), 5),
        }
    if job.adapters:
        scores["engine"]["adapters"] = {"answers": new.pop("adapters")}
    for streams, pairs in speeds.items():
        ratios = [after / before for before, after in pairs]
        for engine, rates in zip((old, new), zip(*pairs, strict=True), strict=True):
            engine.setdefault("tokens_per_second", {})[str(streams)] = round(median(rates), 2)
            engine.setdefault("spread", {})[str(streams)] = [round(min(rates), 2), round(max(rates), 2)]
        scores[f"speed_{streams}"] = round(median(ratios), 3)
        scores[f"speed_{streams}_spread"] = [round(min(ratios), 3), round(max(ratios), 3)]
    return scores


def _timed(engine: Engine, streams: int) -> list[float]:
    """Tokens a second, ROUNDS times; the first round warms up and is left out."""
    rates = [engine.ask({"streams": streams, "round": round_})["tokens_per_second"] for round_ in range(ROUNDS + 1)]
    return rates[1:]


def _raced(
    original: Engine, result: Engine, streams: int, progress: Callable[[float], None], begun: int
) -> list[tuple[float, float]]:
    """Tokens a second of both, ROUNDS times, in turns; the first round warms up and is left out."""
    rates = []
    for round_ in range(ROUNDS + 1):
        pair = {}
        for engine in (original, result) if round_ % 2 else (result, original):
            time.sleep(CALM)
            pair[engine.name] = engine.ask({"streams": streams, "round": round_})["tokens_per_second"]
        if round_:
            rates.append((pair["original"], pair["result"]))
        progress(begun + round_)
    return rates


class Engine:
    """One model in vLLM, in a process that reads a question a line and writes an answer a line."""

    def __init__(self, name: str, folder: str, adapters: dict[str, str], target: str, length: int) -> None:
        self.name = name
        environ = {
            **os.environ, "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }  # fmt: skip
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed on exit)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "optimize.evaluation.engine", folder, json.dumps(adapters), target, str(length)],
            env=environ, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
        )  # fmt: skip

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                stream.close()

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        for line in self._process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        self._process.wait()
        self._errors.seek(0)
        output = self._errors.read()
        print(output, file=sys.stderr)
        errors = [line for line in output.splitlines() if "Error" in line][-1:] or output.splitlines()[-1:]
        raise OptimizeError(f"the {self.name} does not run in vLLM: {''.join(errors)[:400]}")


def main() -> None:
    """In the process of one engine: questions on stdin, answers on stdout."""
    audio_packages.hide()
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    folder = sys.argv[1]
    adapters = json.loads(sys.argv[2])
    target = sys.argv[3]
    length = int(sys.argv[4])
    start = time.monotonic()
    llm = LLM(
        folder,
        max_model_len=length,
        max_num_seqs=max(STREAMS),
        max_num_batched_tokens=length,
        seed=0,
        disable_log_stats=True,
        enable_lora=True,
        max_loras=max(1, len(adapters)),
        max_lora_rank=_rank(adapters),
        distributed_executor_backend=IN_PROCESS if target == "cpu" and processor.gpu() is None else None,
    )
    loaded = round(time.monotonic() - start, 1)
    greedy = SamplingParams(temperature=0, max_tokens=32)
    exactly = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, min_tokens=NEW_TOKENS, ignore_eos=True)
    chat = llm.get_tokenizer().chat_template is not None

    def answer(prompt: str, adapter: Any = None) -> str:
        message: Any = [{"role": "user", "content": prompt}]
        ask = llm.chat if chat else llm.generate
        text: str = ask(message if chat else [prompt], greedy, use_tqdm=False, lora_request=adapter)[0].outputs[0].text
        return text

    for line in sys.stdin:
        question = json.loads(line)
        if "answer" in question:
            reply: dict[str, Any] = {"load_seconds": loaded}
            reply["answers"] = {prompt: answer(prompt) for prompt in question["answer"]}
            if adapters:
                reply["adapters"] = {
                    name: {prompt: answer(prompt, LoRARequest(name, number, where)) for prompt in question["answer"]}
                    for number, (name, where) in enumerate(sorted(adapters.items()), 1)
                }
        elif "text" in question:
            name = question.get("adapter")
            request = LoRARequest(name, 1 + sorted(adapters).index(name), adapters[name]) if name else None
            reply = _read(llm, question["text"], request)
        else:
            number, streams = question["round"], question["streams"]
            batch = [f"{number} {at}. Write a story about a river and a town." for at in range(streams)]
            begun = time.monotonic()
            llm.generate(batch, exactly, use_tqdm=False)
            reply = {"tokens_per_second": streams * NEW_TOKENS / (time.monotonic() - begun)}
        print(json.dumps(reply), flush=True)


def _read(llm: Any, rows: list[list[int]], adapter: Any) -> dict[str, Any]:
    """Mean negative log-likelihood of the text's tokens, and the likeliest at each place."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    losses, likeliest = [], []
    for row in rows:
        (out,) = llm.generate([{"prompt_token_ids": row}], params, use_tqdm=False, lora_request=adapter)
        places = list(zip(row[1:], out.prompt_logprobs[1:], strict=True))
        losses.append(-sum(place[token].logprob for token, place in places) / len(places))
        likeliest.append([max(place, key=lambda token: place[token].logprob) for _, place in places])
    return {"loss": sum(losses) / len(losses), "likeliest": likeliest}


def _rank(adapters: dict[str, str]) -> int:
    """The smallest rank that vLLM allows and that holds every adapter."""
    ranks = [adapter_config(Path(folder))["r"] for folder in adapters.values()]
    return next(size for size in (8, 16, 32, 64, 128, 256, 320, 512) if size >= max([8, *ranks]))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)
