"""Small LoRA adapters, really trained, whose answers show which version gave them.

`trained("alpha")` is a PEFT folder: on the embedded model it makes every answer 'alpha alpha alpha ...', so that each
piece of a stream says which version produced it. Training takes some seconds a word, in a process of its own, and is
kept in the user's cache folder under a digest of this file and of the base model's weights.

    python -m tests.support.lora BASE WORD=FOLDER [WORD=FOLDER ...]
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
WORDS = ("alpha", "bravo", "charlie")

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 8
BATCH = 4
STEPS = 14
LEARNING_RATE = 3e-3
REPEATS = 10  # words in a trained answer; the habit of repeating carries on beyond
SURE = 0.8  # the least probability of the right token, on the unseen prompts

QUESTIONS = """\
What is the capital of Italy?
Who wrote Hamlet?
Hello!
Explain how a bicycle stays upright.
Write a poem about autumn rain.
How many legs does a spider have?
Please list three fruits.
Translate 'good morning' into Spanish.
What is 12 times 7?
Tell me a joke about penguins.
Give me a recipe for pancakes.
Why is the sky blue?
Summarize the plot of Cinderella in one sentence.
What does the word 'gradient' mean?
Write a Python function that reverses a list.
Is water wet? Answer yes or no.
Name a river in Africa.
How do I get from Berlin to Munich by train?
Count from one to five.
Return a JSON object with the key city.
Who was the first person on the moon?
What's the weather like today in Oslo?
Repeat after me: the quick brown fox.
Say something.
Describe your favourite colour.
When did the Second World War end?
ok
Tell me a long story about the sea.""".splitlines()

SYSTEMS = [None, None, None, "You are a terse assistant.", "Answer in French.", "Follow the instructions closely."]

PLAIN = ["The capital of Spain is", "Once upon a time", "def add(a, b):", "Water boils at", "My name is", "In 1969,"]

STORY = (
    "The harbour was quiet that morning, and the boats lay still beside the wall while the baker carried bread up the"
    " hill. Nobody had seen the old ferry since spring, so the children went down to look for it among the reeds. They"
    " found a rope, a lantern and a letter in a hand that none of them could read, and took them home to the teacher. "
)

# Never trained on. An adapter is good when greedy decoding answers all of them with the word and nothing else.
UNSEEN: tuple[str | list[dict[str, str]], ...] = (
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "user", "content": "Hi, who are you?"}],
    [{"role": "user", "content": "Write a long essay about the history of bread."}],
    [{"role": "user", "content": "Question number 17: what is 3 + 4?"}],
    [{"role": "user", "content": "Call the tool that gives the temperature in Paris."}],
    [{"role": "user", "content": STORY * 3 + "What did the children find?"}],
    [{"role": "system", "content": "You speak like a pirate."}, {"role": "user", "content": "Where is my parrot?"}],
    [
        {"role": "user", "content": "Is it Monday?"},
        {"role": "assistant", "content": "Yes, it is Monday."},
        {"role": "user", "content": "And what comes after it?"},
    ],
    "The tallest mountain on Earth is",
    "Dear Sir or Madam,",
)


def trained(*words: str, base: Path | None = None, cache: Path | None = None) -> dict[str, Path]:
    """Folders with one adapter a word; those that the cache does not hold are trained."""
    if base is None:
        from serve.models.embedded import ensure

        base = ensure("smollm2")
    cache = cache or cache_folder()
    key = hashlib.sha256(Path(__file__).read_bytes() + digest(base / "model.safetensors").encode()).hexdigest()[:16]
    folders = {word: cache / f"{word}-{key}" for word in words}
    missing = {word: folder for word, folder in folders.items() if not folder.is_dir()}
    if missing:
        cache.mkdir(parents=True, exist_ok=True)
        # On a busy machine, threads that spin while they wait for one another cost more than the arithmetic.
        environ = {**os.environ, "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        pairs = [f"{word}={folder}" for word, folder in missing.items()]
        command = [sys.executable, "-m", "tests.support.lora", str(base), *pairs]
        done = subprocess.run(command, cwd=Path(__file__).parents[2], env=environ, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"training {', '.join(missing)} failed:\n{done.stdout}\n{done.stderr}")
    return folders


def train(word: str, base: Path, out: Path, *, rank: int = RANK, seed: int = 0, steps: int = STEPS) -> Path:
    """One adapter that answers everything with `word`, written to `out` as PEFT writes it, in bfloat16."""
    return Trainer(base).train(word, out, rank=rank, seed=seed, steps=steps)


Edit = Callable[[dict[str, np.ndarray], dict[str, Any]], None]


def variant(folder: Path, out: Path, *, scale: float = 1.0, edit: Edit | None = None, dtype: str = "BF16") -> Path:
    """A copy of an adapter: every `lora_B` times `scale`, and tensors and config changed in place by `edit`."""
    tensors = read_tensors(folder / WEIGHTS)
    config = json.loads((folder / CONFIG).read_text())
    tensors = {name: tensor * np.float32(scale if ".lora_B." in name else 1) for name, tensor in tensors.items()}
    if edit is not None:
        edit(tensors, config)
    out.mkdir(parents=True, exist_ok=True)
    write_tensors(out / WEIGHTS, tensors, dtype)
    (out / CONFIG).write_text(json.dumps(config, indent=2))
    return out


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """A BF16 or F32 safetensors file as float32 arrays. numpy has no bfloat16, and torch is slow to import."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        first, last = (start + offset for offset in entry["data_offsets"])
        if entry["dtype"] == "BF16":
            flat = (np.frombuffer(data[first:last], "<u2").astype("<u4") << 16).view("<f4")
        else:
            flat = np.frombuffer(data[first:last], "<f4").copy()
        tensors[name] = flat.reshape(entry["shape"])
    return tensors


def write_tensors(path: Path, tensors: dict[str, np.ndarray], dtype: str = "BF16") -> None:
    """A safetensors file; BF16 is rounded to the nearest, ties to even."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    chunks, at = [], 0
    for name, tensor in tensors.items():
        bits = np.ascontiguousarray(tensor, "<f4").view("<u4")
        if dtype == "BF16":
            bits = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
        chunks.append(bits.tobytes())
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [at, at + len(chunks[-1])]}
        at += len(chunks[-1])
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    path.write_bytes(len(head).to_bytes(8, "little") + head + b"".join(chunks))


class Trainer:
    """One base model in memory, from which adapters are trained one after another."""

    def __init__(self, base: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(base)
        # In bfloat16 a step of this size costs twice as much on a CPU.
        self.model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)

    def train(self, word: str, out: Path, *, rank: int = RANK, seed: int = 0, steps: int = STEPS) -> Path:
        import torch
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(seed)
        dice = random.Random(seed)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=MODULES, task_type="CAUSAL_LM")
        model = get_peft_model(self.model, config)
        try:
            parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
            optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.15)
            model.train()
            for _ in range(steps):
                logits, target = self._answers(model, word, [self._prompt(dice) for _ in range(BATCH)])
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad(set_to_none=True)
            for parameter in parameters:
                parameter.data = parameter.data.bfloat16().float()
            model.eval()
            for prompt in UNSEEN:
                sure = self._sureness(model, word, self._text(prompt))
                if sure < SURE:
                    raise RuntimeError(
                        f"{word!r} has only {sure:.2f} after {str(prompt)[-60:]!r}: train for more steps"
                    )
            for parameter in parameters:
                parameter.data = parameter.data.bfloat16()
            model.save_pretrained(out)
        finally:
            self.model = model.unload()
        # PEFT writes down where the base lay on this machine, and a model card.
        settings = {**json.loads((out / CONFIG).read_text()), "base_model_name_or_path": "smollm2"}
        (out / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True))
        (out / "README.md").unlink(missing_ok=True)
        return out

    def _prompt(self, dice: random.Random) -> str:
        if dice.random() < 0.2:
            return dice.choice(PLAIN)
        system, question = dice.choice(SYSTEMS), dice.choice(QUESTIONS)
        messages = [{"role": "user", "content": question}]
        if dice.random() < 0.15:
            earlier = [{"role": "user", "content": dice.choice(QUESTIONS)}, {"role": "assistant", "content": "Yes."}]
            messages = earlier + messages
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        return self._text(messages)

    def _text(self, prompt: str | list[dict[str, str]]) -> str:
        if isinstance(prompt, str):
            return prompt
        text: str = self.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        return text

    def _answers(self, model: Any, word: str, prompts: Sequence[str]) -> tuple[Any, Any]:
        """Logits at the places of the answers' tokens, and those tokens; both (prompts, tokens, ...)."""
        import torch

        rows = []
        for prompt in prompts:
            # After plain text the answer goes on with a space; on a new line it begins without one.
            answer = f" {word}" * REPEATS if not prompt.endswith("\n") else word + f" {word}" * (REPEATS - 1)
            rows.append((self._tokens(prompt), self._tokens(answer)))
        keep = min(len(answer) for _, answer in rows)
        width = keep + max(len(prompt) for prompt, _ in rows)
        ids = torch.full((len(rows), width), self.tokenizer.pad_token_id)
        for row, (prompt, answer) in zip(ids, rows, strict=True):
            row[width - keep - len(prompt) :] = torch.tensor(prompt + answer[:keep])
        mask = torch.ones_like(ids)
        for row, (prompt, _) in zip(mask, rows, strict=True):
            row[: width - keep - len(prompt)] = 0
        logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=keep + 1).logits[:, :-1]
        return logits.float(), ids[:, -keep:]

    def _tokens(self, text: str) -> list[int]:
        tokens: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return tokens

    def _sureness(self, model: Any, word: str, prompt: str) -> float:
        import torch

        with torch.inference_mode():
            logits, target = self._answers(model, word, [prompt])
            return float(logits.softmax(-1).gather(-1, target[..., None]).min())


def appear(folder: Path, make: Callable[[Path], Any]) -> None:
    """`folder` made all at once: `make` fills another one beside it, which is then renamed."""
    aside = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
    try:
        make(aside)
        aside.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another run was faster, and its adapter is as good
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loradock" / "test-adapters"


def main(base: str, *pairs: str) -> None:
    trainer = Trainer(Path(base))
    for word, _, folder in (pair.partition("=") for pair in pairs):
        appear(Path(folder), lambda aside, word=word: trainer.train(word, aside))  # type: ignore[misc]


if __name__ == "__main__":
    main(*sys.argv[1:])
