"""The held-out text in tokens, as the original and as the result reads it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from optimize.checkpoint.model import tokenizer
from optimize.data import text
from optimize.job import Job
from optimize.steps.prune.vocabulary import mapping

# How the names of a tokenizer's files begin.
TOKENIZER = (
    "tokenizer",
    "vocab",
    "merges",
    "special_tokens",
    "added_tokens",
    "chat_template",
    "spiece",
    "sentencepiece",
)


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Windows (1, tokens) in the original's tokens and in the result's; `kept` are the original's tokens that the
    result has, by the result's numbers, or None where both have the same."""

    words: Any
    new_words: Any
    original: list[torch.Tensor]
    result: list[torch.Tensor]
    kept: torch.Tensor | None


def held_out(job: Job) -> HeldOut:
    words = tokenizer(Path(job.reference))
    same = _said(Path(job.reference)) == _said(Path(job.model))
    new_words = words if same else tokenizer(Path(job.model))
    part = job.evaluate
    ids = torch.tensor(text.windows(words, text.documents(part, True), part.samples, part.tokens, job.seed))
    kept = None if same else mapping(words, new_words)
    original = list(ids.split(1))
    result = original if kept is None else [_again(words, new_words, row[0].tolist()) for row in original]
    return HeldOut(words, new_words, original, result, kept)


def _said(folder: Path) -> dict[str, bytes]:
    """The files of a model's folder that say what its tokenizer is, as far as they are more than its config."""
    return {
        file.name: file.read_bytes() for file in folder.iterdir() if file.is_file() and file.name.startswith(TOKENIZER)
    }


def own_text(job: Job, held: HeldOut, adapter: str, samples: int) -> list[torch.Tensor]:
    """Windows (1, tokens) of the adapter's own text in the result's tokens; nothing where the recipe gives none."""
    if adapter not in job.evaluate.adapter_texts:
        return []
    part = msgspec.structs.replace(job.evaluate, text=job.evaluate.adapter_texts[adapter])
    windows = text.windows(held.words, text.documents(part, True), samples, part.tokens, job.seed)
    if held.kept is None:
        return list(torch.tensor(windows).split(1))
    return [_again(held.words, held.new_words, ids) for ids in windows]


def _again(words: Any, new_words: Any, ids: list[int]) -> torch.Tensor:
    """The text of a window in another tokenizer's tokens, (1, tokens)."""
    said = words.decode(ids[len(text.beginning(words)) :])
    return torch.tensor([text.beginning(new_words) + new_words(said, add_special_tokens=False).input_ids])
