"""The part `kinds` of `make gpu`: adapters of each kind beside one another in one engine, against PEFT on the host.

DoRA follows layers one by one, so the engine runs them eagerly, in a rehearsal without our kernels (`_loradock`). LoHa
and the others that become LoRA at a push are LoRA to an engine, and so is a mixture.
"""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from tests.support import peft_kinds, plain_words

if TYPE_CHECKING:
    from tests.support.server import Server

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Of common words of the model: the second and the third of its own.
TOKENS = [3, 4]
LABELS = ("good", "bad", "neither")
HEAD, MIXTURE, WEIGHTS = "head", "mixture", {"lora": 0.7, "rslora": -0.3}
KINDS: Mapping[str, Mapping[str, Any]] = {
    "lora": {"target_modules": MODULES},
    "rslora": {"target_modules": MODULES, "use_rslora": True},
    "dora": {"target_modules": MODULES, "use_dora": True},
    "tokens": {"target_modules": ["q_proj", "v_proj"], "trainable_token_indices": TOKENS},
    "dora-tokens": {"target_modules": ["v_proj"], "use_dora": True, "trainable_token_indices": TOKENS},
    HEAD: {"target_modules": ["q_proj", "v_proj"], "task_type": "SEQ_CLS"},
}
# Of the server: as in vLLM's layers, and room for all of them in a batch.
OPTIONS = ("--enforce-eager", "--max-loras", "8", "--no-probe")
COUNT = 8


def made(base: Path, work: Path) -> dict[str, Path]:
    """The folders of all adapters, as if they were trained."""
    import peft

    folders = {}
    for seed, (name, settings) in enumerate(KINDS.items()):
        config = peft.LoraConfig(r=4, lora_alpha=8, **settings)
        folders[name] = work / f"kind-{name}"
        peft_kinds.trained(_base(base, name), config, folders[name], seed, scale=0.05)
    file = folders[HEAD] / "adapter_config.json"
    named = {"id2label": {str(number): label for number, label in enumerate(LABELS)}}
    file.write_text(json.dumps(json.loads(file.read_text()) | named))
    return folders


def _base(base: Path, name: str) -> Any:
    return copy.deepcopy(_loaded(base, name == HEAD))


@cache
def _loaded(base: Path, classifies: bool) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if classifies:
        return AutoModelForSequenceClassification.from_pretrained(base, dtype=torch.float32, num_labels=len(LABELS))
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def expected(base: Path, folders: Mapping[str, Path], name: str) -> Callable[[list[int]], Any]:
    """PEFT's model of that name: token ids -> log-probabilities of each place, or those of the labels."""
    import peft
    import torch

    if name == MIXTURE:
        first, *others = WEIGHTS
        model = peft.PeftModel.from_pretrained(_base(base, name), folders[first], adapter_name=first)
        for other in others:
            model.load_adapter(str(folders[other]), adapter_name=other)
        model.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), MIXTURE, combination_type="cat")
        model.set_adapter(MIXTURE)
    else:
        model = peft.PeftModel.from_pretrained(_base(base, name), folders[name])
    model.eval()

    def likely(tokens: list[int]) -> Any:
        with torch.inference_mode():
            return model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)

    return likely


async def answers(url: str, prompts: list[str]) -> dict[str, list[Any]]:
    """What each kind answers to each prompt, all of it asked at once."""
    model = {name: name for name in KINDS} | {MIXTURE: "+".join(f"{name}:{by}" for name, by in WEIGHTS.items())}
    async with httpx.AsyncClient(base_url=url, timeout=300) as http:

        async def ask(name: str, prompt: str) -> Any:
            if name == HEAD:
                path, more = "/v1/classify", {"input": prompt}
            else:
                more = {"prompt": prompt, "max_tokens": COUNT, "temperature": 0, "logprobs": 1, "ignore_eos": True}
                path, more = "/v1/completions", {**more, "return_token_ids": True}
            answer = await http.post(path, json={"model": model[name], **more})
            return answer.raise_for_status().json()

        asked = [(name, prompt) for prompt in prompts for name in model]
        told = await asyncio.gather(*(ask(*each) for each in asked))
    return {name: [answer for (each, _), answer in zip(asked, told, strict=True) if each == name] for name in model}


def differences(
    base: Path, folders: Mapping[str, Path], told: Mapping[str, list[Any]], prompts: list[str]
) -> dict[str, float]:
    """By kind, how far log-probabilities (of a head, probabilities) are off PEFT's at most."""
    words, worst = plain_words.tokenizer(), {}
    for name, each in told.items():
        likely, off = expected(base, folders, name), 0.0
        for prompt, answer in zip(prompts, each, strict=True):
            if name == HEAD:
                right = likely(words(prompt).input_ids).exp().tolist()
                off = max(off, *(abs(a - b) for a, b in zip(right, answer["data"][0]["probs"], strict=True)))
                continue
            [choice] = answer["choices"]
            before, after = choice["prompt_token_ids"], choice["token_ids"]
            rows = likely([*before, *after])
            for at, (token, value) in enumerate(zip(after, choice["logprobs"]["token_logprobs"], strict=True)):
                off = max(off, abs(float(rows[len(before) + at - 1, token]) - value))
        worst[name] = off
    return worst


def measured(server: Server, base: Path, folders: Mapping[str, Path], prompts: list[str]) -> Mapping[str, str]:
    """Rows of the table, of a server that has none of them yet."""
    for name, folder in folders.items():
        server.upload(name, folder).raise_for_status()
    told = asyncio.run(answers(server.url, prompts))
    unit = {HEAD: "probabilities"}
    return {
        f"{name} beside the others, against PEFT": f"{unit.get(name, 'log-probabilities')} at most {off:.3f} off"
        for name, off in differences(base, folders, told, prompts).items()
    }
