"""`make speculation`: what `--speculation ngram` gains on extractions and edits, what it costs in chats, and that no
answer is another.

Two whole servers, with and without, are asked the same prompts one after the other, each first in every other round:
one stream, greedy, from the request to the end of the answer. The table has the ratio of their times for each kind of
prompt, median, least and most of the rounds, and how many tokens were drafted and right. Then both answer many prompts,
several at a time, and every answer is compared. Where two differ, the first token at which they do may be no less
likely than the other by more than rounding: TOLERANCE nats.

    python -m tests.campaigns.speculation [--rounds 5] [--prompts 8] [--equal 1000] [--seed -1]
        [--streams 1] [--serve "--cpu-weights int8"]

`--rounds 0` only compares. Another `--seed` compares answers to other prompts.
"""

from __future__ import annotations

import argparse
import random
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

from tests.campaigns.cpu_speed import processor
from tests.support.lora import PLAIN, QUESTIONS
from tests.support.server import BASE, Server, done

TOLERANCE = 0.5  # nats: four steps of a bfloat16 logit near 20
SETTINGS = ("--max-model-len", "2048", "--no-probe", "--no-enable-prefix-caching")
KINDS = ("extraction", "edit", "chat")
TOKENS = 200
SHORT = 96  # tokens of an answer that is compared
NAMES = (
    "Maria Lopez",
    "Peter Novak",
    "Aisha Khan",
    "Tom Becker",
    "Yuki Tanaka",
    "Olga Petrova",
    "Liam Murphy",
    "Nina Rossi",
)
CITIES = ("Lisbon", "Prague", "Rotterdam", "Oslo", "Vienna", "Dublin", "Turin", "Gdansk")
GOODS = ("blue chairs", "oak tables", "desk lamps", "wool carpets", "glass shelves", "garden benches")


def record(dice: random.Random) -> str:
    """Some sentences about an order, as they might be in a letter."""
    name, city = dice.choice(NAMES), dice.choice(CITIES)
    address = f"{name.split()[0].lower()}.{dice.randrange(100)}@example.com"
    return (
        f"{name} ({address}) ordered {dice.randrange(2, 9)} {dice.choice(GOODS)} on {dice.randrange(1, 29)} March for "
        f"{dice.randrange(40, 900)}.{dice.randrange(10, 99)} euros. The order number is "
        f"AX-{dice.randrange(10**4, 10**5)}, and it ships to {dice.randrange(1, 99)} Harbour Street, {city}."
    )


def code(dice: random.Random) -> str:
    name, other = dice.sample(("total", "average", "largest", "spread", "shift", "scale"), 2)
    return (
        f"def {name}(values, factor={dice.randrange(2, 9)}):\n    result = 0\n    for value in values:\n"
        f"        result += value * factor\n    return result\n\n\ndef {other}(values):\n"
        f"    return {name}(values) / {dice.randrange(2, 99)}\n"
    )


def extraction(dice: random.Random) -> str:
    text = " ".join(record(dice) for _ in range(3))
    asked = dice.choice((
        "Copy this text word for word.",
        "List every person with the e-mail address and the order number.",
        "Write down each sentence that has an order number, exactly as it is.",
        "Which orders are in this text? Quote the sentences.",
    ))  # fmt: skip
    return f"{asked}\n\n{text}"


def edit(dice: random.Random) -> str:
    if dice.random() < 0.4:
        return f"Rename `values` to `numbers` in this code and give back all of it.\n\n```python\n{code(dice)}```"
    text = " ".join(record(dice) for _ in range(2))
    asked = dice.choice((
        "Rewrite this text with euros replaced by dollars. Change nothing else.",
        "Correct the spelling in this text and give back all of it.",
        "Repeat this text, with March replaced by April.",
    ))  # fmt: skip
    return f"{asked}\n\n{text}"


def chat(dice: random.Random) -> str:
    return dice.choice((*QUESTIONS, *PLAIN))


def prompts(kind: str, count: int, seed: int = 0) -> list[str]:
    dice = random.Random(f"{kind} {seed}")
    return [{"extraction": extraction, "edit": edit, "chat": chat}[kind](dice) for _ in range(count)]


def ask(server: Server, prompt: str, **more: Any) -> dict[str, Any]:
    body = {"model": BASE, "messages": [{"role": "user", "content": prompt}], "max_tokens": TOKENS, "temperature": 0}
    return done(server.http.post("/v1/chat/completions", json=body | more))


def seconds(server: Server, asked: Sequence[str], streams: int) -> float:
    began = time.perf_counter()
    with ThreadPoolExecutor(streams) as pool:
        list(pool.map(lambda prompt: ask(server, prompt), asked))
    return time.perf_counter() - began


def drafted(server: Server) -> tuple[float, float]:
    """Tokens that were drafted, and right, since the server's start."""
    time.sleep(1.1)  # a scrape is good for a second
    counted = re.findall(
        r'^loradock_draft_tokens_total\{.*result="(\w+)".*\} (\S+)$', server.http.get("/metrics").text, re.M
    )
    accepted = sum(float(value) for result, value in counted if result == "accepted")
    return sum(float(value) for _, value in counted), accepted


def speed(plain: Server, drafting: Server, rounds: int, count: int, streams: int) -> list[str]:
    """A row of the table for each kind."""
    rows = []
    for kind in KINDS:
        ratios, before = [], drafted(drafting)
        for number in range(rounds):
            asked = prompts(kind, count, number)
            order = [plain, drafting] if number % 2 == 0 else [drafting, plain]
            times = {id(server): 0.0 for server in order}
            for start in range(0, count, streams):
                for server in order:
                    times[id(server)] += seconds(server, asked[start : start + streams], streams)
            ratios.append(times[id(plain)] / times[id(drafting)])
        now = drafted(drafting)
        made, right = now[0] - before[0], now[1] - before[1]
        share = f"{right:.0f} of {made:.0f}" if made else "none"
        rows.append(f"| {kind} | {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | {share} |")
    return rows


def apart(plain: Server, prompt: str, answers: Sequence[Sequence[int]]) -> float:
    """Nats by which the first token that differs was less likely than the one that is said alone, without drafts.

    Either of two answers may be the one that differs: what is beside a request moves a near tie too. By tokens, and not
    by their texts: " ordered" begins as " " does.
    """
    more = {"max_tokens": SHORT, "logprobs": True, "top_logprobs": 20, "return_tokens_as_token_ids": True}
    said = ask(plain, prompt, **more)["choices"][0]["logprobs"]["content"]
    return max(_apart(said, answer) for answer in answers)


def _apart(said: Sequence[dict[str, Any]], other: Sequence[int]) -> float:
    for place, number in zip(said, other, strict=False):
        if place["token"] != f"token_id:{number}":
            tops = {top["token"]: top["logprob"] for top in place["top_logprobs"]}
            return place["logprob"] - tops.get(f"token_id:{number}", -99.0)
    return 0.0  # the same, or one goes on where the other ended: the end is not among the tokens


def equal(plain: Server, drafting: Server, count: int, together: int, seed: int) -> tuple[int, int, list[float]]:
    """How many answers are the same with drafts, how many when they are asked for again without, and how far apart the
    former are where they part.
    """
    asked = [prompt for kind in KINDS for prompt in prompts(kind, -(-count // len(KINDS)), seed)][:count]
    answers = []
    for server in (plain, drafting, plain):
        with ThreadPoolExecutor(together) as pool:
            replies = pool.map(
                lambda prompt, server=server: ask(server, prompt, max_tokens=SHORT, return_token_ids=True), asked
            )
            answers.append([it["choices"][0]["token_ids"] for it in replies])
    first, drafted, again = answers
    pairs = [(prompt, one, other) for prompt, one, other in zip(asked, first, drafted, strict=True) if one != other]
    same_again = sum(one == other for one, other in zip(first, again, strict=True))
    return len(asked) - len(pairs), same_again, [apart(plain, prompt, both) for prompt, *both in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=8, help="of each kind in a round")
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--equal", type=int, default=1000, help="prompts whose answers are compared")
    parser.add_argument("--seed", type=int, default=-1, help="of these prompts")
    parser.add_argument("--together", type=int, default=4, help="of them at a time")
    parser.add_argument("--kv-cache", default="512M", help="of each server")
    parser.add_argument("--serve", default="", help="further settings of both servers")
    given = parser.parse_args()
    settings = [*SETTINGS, "--kv-cache-memory-bytes", given.kv_cache, *shlex.split(given.serve)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (
            Server(folder / "plain", folder / "plain.log", *settings) as plain,
            Server(folder / "ngram", folder / "ngram.log", *settings, "--speculation", "ngram") as drafting,
        ):
            for server in (plain, drafting):
                seconds(server, prompts("chat", 2), 1)
            if given.rounds:
                print(f"{given.rounds} rounds of {given.prompts}, {given.streams} at a time, {processor()}\n")
                print("| prompts | time without / with drafts | drafts that were right |\n|---|---|---|", flush=True)
                for row in speed(plain, drafting, given.rounds, given.prompts, given.streams):
                    print(row, flush=True)
            before = drafted(drafting)
            same, again, gaps = equal(plain, drafting, given.equal, given.together, given.seed)
            made, right = (now - then for now, then in zip(drafted(drafting), before, strict=True))
    worst = max(gaps, default=0)
    print(f"\n{same} of {given.equal} answers are the same; the others part at tokens {worst:.3f} nats apart")
    print(f"{again} of {given.equal} are when they are asked for once more without drafts")
    print(f"{right:.0f} of {made:.0f} drafts were right there")
    if worst > TOLERANCE:
        sys.exit("an answer differs by more than rounding explains")


if __name__ == "__main__":
    main()
