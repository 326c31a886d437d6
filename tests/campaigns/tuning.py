"""200 examples train the embedded model on a task: how long it takes, and what it then answers on examples held out.

    python -m tests.campaigns.tuning [FOLDER] [--examples 200] [--held 50] [--method supervised|dpo]

The task: an order in a sentence becomes one line, `item | count | city`, as the prompt asks. A third of the items and
cities are in held-out examples alone. An answer is right when it is the line and nothing else. `dpo` prefers the
line over the same order as a sentence, and counts the held-out pairs whose line gained more.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from optimize import cli
from serve.models.embedded import ensure
from tests.campaigns.cpu_speed import processor

ITEMS = [
    "apples", "chairs", "lamps", "books", "bottles", "carpets", "candles", "tables", "pillows", "forks",
    "plates", "mirrors", "shelves", "brushes", "towels", "baskets", "clocks", "kettles", "blankets", "hammers",
    "ladders", "buckets", "ropes", "tents",
]  # fmt: skip
CITIES = [
    "Oslo", "Paris", "Lima", "Cairo", "Berlin", "Madrid", "Boston", "Quito", "Dublin", "Vienna", "Prague",
    "Warsaw", "Sydney", "Tokyo", "Delhi", "Naples", "Porto", "Basel", "Ghent", "Turin", "Malmo", "Perth",
    "Osaka", "Lagos",
]  # fmt: skip
SENTENCES = (
    "Please send {count} {item} to our shop in {city}.",
    "We need {count} {item} in {city} by Friday.",
    "Could you ship {count} {item} to {city}?",
    "The office in {city} ordered {count} {item}.",
    "{city} wants {count} {item}, the sooner the better.",
    "I would like {count} {item} delivered to {city}, thank you.",
)
ASK = "Write this order as one line: item | count | city\n\n"
SEEN = 2 / 3  # of items and cities


def order(dice: random.Random, seen: bool) -> tuple[str, str]:
    """A prompt and its line."""
    items, cities = (words[: int(len(words) * SEEN)] if seen else words for words in (ITEMS, CITIES))
    item, count, city = dice.choice(items), dice.randrange(2, 99), dice.choice(cities)
    return ASK + dice.choice(SENTENCES).format(item=item, count=count, city=city), f"{item} | {count} | {city}"


def orders(seed: int, count: int, seen: bool) -> list[tuple[str, str]]:
    dice = random.Random(seed)
    return [order(dice, seen) for _ in range(count)]


def example(prompt: str, line: str, method: str) -> dict[str, Any]:
    user, answer = {"role": "user", "content": prompt}, {"role": "assistant", "content": line}
    if method == "supervised":
        return {"messages": [user, answer]}
    item, count, city = line.split(" | ")
    other = {"role": "assistant", "content": f"The order is for {count} {item}, which go to {city}."}
    return {"input": {"messages": [user]}, "preferred_output": [answer], "non_preferred_output": [other]}


def trained(folder: Path, base: Path, method: str, train: list[tuple[str, str]], held: list[tuple[str, str]]) -> float:
    """The adapter in `folder / "adapter"`; the seconds it took."""
    for name, rows in (("train", train), ("valid", held)):
        lines = [json.dumps(example(prompt, line, method)) + "\n" for prompt, line in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    step = {"tune": {"method": method, "train": "train.jsonl", "validation": "valid.jsonl"}}
    recipe = {"model": str(base), "steps": [step], "export": {"format": "adapter"}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    begun = time.monotonic()
    assert cli.run(["tune", str(folder)], Path) == 0
    return time.monotonic() - begun


def answers(base: Path, adapter: Path | None, prompts: list[str], tokens: int = 24) -> list[str]:
    """Greedy answers through transformers and PEFT."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words = AutoTokenizer.from_pretrained(base, padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    given = []
    for at in range(0, len(prompts), 25):
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts[at : at + 25]]
        batch = words.apply_chat_template(
            chats, add_generation_prompt=True, return_tensors="pt", padding=True, return_dict=True
        )
        with torch.inference_mode():
            out = model.generate(**batch, max_new_tokens=tokens, do_sample=False)
        given += words.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in given]


def right(given: list[str], held: list[tuple[str, str]]) -> float:
    return sum(answer == line for answer, (_, line) in zip(given, held, strict=True)) / len(held)


def measured(folder: Path, base: Path, method: str, count: int, held_out: int) -> dict[str, Any]:
    train, held = orders(0, count, seen=True), orders(1, held_out, seen=False)
    valid = orders(2, max(10, count // 10), seen=True)
    seconds = trained(folder, base, method, train, valid)
    prompts = [prompt for prompt, _ in held]
    before, after = answers(base, None, prompts), answers(base, folder / "adapter", prompts)
    lines = [json.loads(line) for line in (folder / "progress.jsonl").read_text().splitlines()]
    evaluated = [line for line in lines if line["valid_loss"] is not None]
    return {
        "seconds": round(seconds, 1), "training_seconds": lines[-1]["seconds"], "tokens": lines[-1]["tokens"],
        "steps": lines[-1]["step"], "base": right(before, held), "tuned": right(after, held),
        "valid_loss": evaluated[-1]["valid_loss"], "valid_accuracy": evaluated[-1]["valid_accuracy"],
        "examples": list(zip(prompts, before, after, strict=True))[:2],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--held", type=int, default=50)
    parser.add_argument("--method", choices=["supervised", "dpo"], default="supervised")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as aside:
        folder = Path(given.folder or aside)
        folder.mkdir(parents=True, exist_ok=True)
        found = measured(folder, ensure("smollm2"), given.method, given.examples, given.held)
    print(
        f"{processor()}: {given.method}, {given.examples} examples, {found['steps']} steps, {found['tokens']:,} tokens"
    )
    print(f"  {found['seconds']} s in all, {found['training_seconds']} s of them training")
    print(f"  right of {given.held} held out: the base {found['base']:.0%}, trained {found['tuned']:.0%}")
    print(f"  held-out loss {found['valid_loss']}, accuracy {found['valid_accuracy']:.1%}")
    for prompt, before, after in found["examples"]:
        print(f"  {prompt.splitlines()[-1]!r}\n    base    {before!r}\n    trained {after!r}")


if __name__ == "__main__":
    main()
