"""`make company`: whether an answer depends on what else the engine computes beside it. It must not.

A server with adapters of the layers, the embedding and the output layer is asked the same requests twice: one at a
time, and many at once in another order, so that prompts are cut over steps and steps are shared. Half are greedy, half
drawn with a seed. Tokens and log-probabilities of both times have to be equal to the last digit.

    python -m tests.campaigns.company [--weights auto int8 int4] [--prompts 20] [--together 8] [--tokens 48]
        [--serve "--speculation ngram"]
"""

from __future__ import annotations

import argparse
import random
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.campaigns.cpu_speed import processor
from tests.campaigns.speculation import KINDS, prompts
from tests.support.edge_adapters import EMBEDDING, HEAD, edge_adapter
from tests.support.lora import WORDS, trained, variant
from tests.support.server import BASE, Server, done

SAMPLING: tuple[dict[str, Any], ...] = ({"temperature": 0}, {"temperature": 0.9, "seed": 5, "top_p": 0.95})
SCALE = 0.15  # of adapters that were trained to say one word: so many other tokens are near to theirs


def requests(models: Sequence[str], asked: Sequence[str], tokens: int) -> list[dict[str, Any]]:
    """Each prompt for one model after the other, in every way of sampling by turns."""
    same = {"max_tokens": tokens, "ignore_eos": True, "logprobs": True, "top_logprobs": 3, "return_token_ids": True}
    return [
        {"model": model, "messages": [{"role": "user", "content": prompt}], **same, **SAMPLING[(i + j) % len(SAMPLING)]}
        for i, prompt in enumerate(asked)
        for j, model in enumerate(models)
    ]


def answers(server: Server, asked: Sequence[dict[str, Any]], together: int) -> list[dict[str, Any]]:
    """The first choice of each, as the server says it."""

    def answer(body: dict[str, Any]) -> dict[str, Any]:
        choice: dict[str, Any] = done(server.http.post("/v1/chat/completions", json=body))["choices"][0]
        return choice

    with ThreadPoolExecutor(together) as pool:
        return list(pool.map(answer, asked))


def apart(server: Server, asked: Sequence[dict[str, Any]], together: int, seed: int = 0) -> list[dict[str, Any]]:
    """The requests whose answers differ alone and beside others."""
    alone = answers(server, asked, 1)
    order = random.Random(seed).sample(range(len(asked)), len(asked))
    beside = dict(zip(order, answers(server, [asked[i] for i in order], together), strict=True))
    return [body for i, body in enumerate(asked) if alone[i] != beside[i]]


def adapters(folder: Path) -> Iterator[tuple[str, Path]]:
    for word, path in trained(*WORDS).items():
        yield word, variant(path, folder / word, scale=SCALE)
    yield "embedding", edge_adapter(folder / "embedding", 1, EMBEDDING)
    yield "output", edge_adapter(folder / "output", 2, HEAD)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--weights", nargs="*", default=["auto", "int8", "int4"], help="as serve's --cpu-weights")
    parser.add_argument("--prompts", type=int, default=20, help="each for the base and every adapter")
    parser.add_argument("--together", type=int, default=8, help="requests at a time")
    parser.add_argument("--tokens", type=int, default=48, help="of an answer")
    parser.add_argument("--serve", default="", help="further settings")
    given = parser.parse_args()
    asked = [prompt for kind in KINDS for prompt in prompts(kind, -(-given.prompts // len(KINDS)))][: given.prompts]
    print(f"{processor()}; {given.together} at a time, {given.tokens} tokens\n")
    print(
        "| `--cpu-weights` | multiplied as | answers that are the same alone | those that are not |\n|---|---|---|---|"
    )
    failed = False
    for weights in given.weights:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            settings = ["--cpu-weights", weights, "--max-loras", "5", "--kv-cache-memory-bytes", "1G", "--no-probe"]
            settings += ["--max-model-len", "2048", *shlex.split(given.serve)]
            with Server(folder / "data", folder / "log", *settings) as server:
                models = [BASE]
                for adapter, path in adapters(folder / "adapters"):
                    done(server.upload(adapter, path))
                    models.append(adapter)
                bodies = requests(models, asked, given.tokens)
                wrong = apart(server, bodies, given.together)
                words = done(server.http.get("/v1/engines"))["data"][0]["weights"]
        failed |= bool(wrong)
        of = ", ".join(f"{sum(body['model'] == model for body in wrong)} of {model}" for model in models)
        print(
            f"| {weights} | {words} | {len(bodies) - len(wrong)} of {len(bodies)} | {of if wrong else 'none'} |",
            flush=True,
        )
    if failed:
        sys.exit("an answer depends on what is beside it")


if __name__ == "__main__":
    main()
