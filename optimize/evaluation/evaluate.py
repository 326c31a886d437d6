"""Measure the result on held-out tokens, against the model that it came from.

Perplexity of both, the mean KL divergence and the share of tokens with the same likeliest successor, what each
adapter still does on the new base, and some answers side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import log_softmax

from optimize.checkpoint.checkpoint import Checkpoint
from optimize.checkpoint.model import adapted, answered, last_states, logits, opened, settle
from optimize.errors import OptimizeError
from optimize.evaluation.held_out import held_out
from optimize.job import Job, Progress
from optimize.steps import planning

ANSWER = 32  # tokens
ADAPTED = 8  # windows that adapters are measured on
Ask = Callable[[torch.Tensor], torch.Tensor]


def run(job: Job, progress: Progress) -> dict[str, Any]:
    settle(job.seed, job.device)
    reference = Path(job.reference)
    text = held_out(job)
    words = text.words
    new_words = text.new_words
    kept = text.kept
    rows = text.result
    in_onnx = job.options["format"] == "onnx"
    by_layer = planning.by_layer(2 * sum(map(math.prod, Checkpoint(reference).shapes.values())), job.memory)
    old = opened(reference, by_layer=by_layer)
    scores: dict[str, Any] = {}
    samples: list[dict[str, Any]] = []
    if in_onnx:
        from optimize.export.session import Session

        new: Any = None
        session = Session(Path(job.model))
        ask: Ask = session.logits
    else:
        new = opened(Path(job.model), by_layer=by_layer)
        ask = partial(logits, new)
    living = sorted(job.adapters)
    total = len(rows) + 2 * len(living) * min(ADAPTED, len(rows))
    asked = rows if kept is None else [kept[row] for row in rows]
    right, answers = _answers(old, asked, by_layer), map(ask, rows) if in_onnx else _answers(new, rows, by_layer)
    if kept is not None:
        right = (row[..., kept] for row in right)
    scores |= compared(right, answers, rows, lambda done: progress(done, total, "held-out text"))
    if kept is not None:
        scores |= _in_old_tokens(partial(logits, old), text.original, rows, scores["perplexity"])
    if job.base != job.reference:
        scores |= _against_base(Path(job.base), text.original, by_layer, scores["perplexity"])
    effects = {}
    done = len(rows)
    for name in living:
        places = Path(job.originals[name]), Path(job.adapters[name])
        effects[name] = _effect(old, new, *places, rows[:ADAPTED], kept)
        done += 2 * min(ADAPTED, len(rows))
        progress(done, total, f"adapter {name}")
    if effects:
        scores["adapters"] = effects
        scores["worst_adapter_kl"] = max(effect["kl"] for effect in effects.values())
        scores["worst_adapter_effect"] = min(effect["cosine"] for effect in effects.values())
    for prompt in job.evaluate.prompts:
        line = {"prompt": prompt, "original": _answer(partial(logits, old), words, prompt)}
        line["result"] = _answer(ask, new_words, prompt)
        for name in living:
            with adapted(new, Path(job.adapters[name])) as both:
                line[name] = _answer(partial(logits, both), new_words, prompt)
        samples.append(line)
    if job.options["format"] != "onnx":
        before, after = Checkpoint(reference), Checkpoint(Path(job.model))
        scores["bytes_original"], scores["bytes"] = before.bytes, after.bytes
    else:
        scores["bytes_original"] = Checkpoint(reference).bytes
        scores["bytes"] = sum(file.stat().st_size for file in Path(job.model).glob("model.onnx*"))
    scores["size_ratio"] = round(scores["bytes"] / scores["bytes_original"], 4)
    scores["samples"] = samples
    return {"scores": scores}


def _answers(model: Any, rows: list[torch.Tensor], by_layer: bool) -> Iterator[torch.Tensor]:
    """The logits (1, tokens, vocabulary) of each row."""
    if not by_layer:
        yield from map(partial(logits, model), rows)
        return
    for state in last_states(model, rows, lambda _: None):
        # Whoever reads this generator is not inside of the mode meanwhile.
        with torch.inference_mode():
            answer = answered(model, state).float()
        yield answer


def compared(
    old: Iterable[torch.Tensor],
    new: Iterable[torch.Tensor],
    rows: list[torch.Tensor],
    progress: Callable[[int], None],
) -> dict[str, Any]:
    """Scores of `new` logits against `old` over windows of tokens, (1, tokens) each, one window at a time."""
    loss_old = loss_new = divergence = same = 0.0
    for done, (row, right_logits, logits_now) in enumerate(zip(rows, old, new, strict=True)):
        right = row[0, 1:, None]
        before = log_softmax(right_logits[0, :-1], -1)
        after = log_softmax(logits_now[0, :-1], -1)
        loss_old -= float(before.gather(-1, right).mean())
        loss_new -= float(after.gather(-1, right).mean())
        divergence += float((before.exp() * (before - after)).sum(-1).mean())
        same += float((before.argmax(-1) == after.argmax(-1)).float().mean())
        progress(done + 1)
    count = len(rows)
    if not math.isfinite(loss_new):
        raise OptimizeError("the result answers with NaN or infinity on the held-out text: it is broken")
    return {
        "perplexity_original": round(math.exp(loss_old / count), 4),
        "perplexity": round(math.exp(loss_new / count), 4),
        "perplexity_increase": round(math.expm1((loss_new - loss_old) / count), 5),
        "log_perplexity": round(loss_new / count, 5),  # in the result's own tokens
        "kl": round(divergence / count, 5),
        "top1": round(same / count, 5),
    }


def _against_base(base: Path, rows: list[torch.Tensor], by_layer: bool, perplexity: float) -> dict[str, float]:
    """What adapters that were merged changed: the base by itself, where it is not what the result is compared with."""
    loss = _loss(_answers(opened(base, by_layer=by_layer), rows, by_layer), rows)
    increase = math.expm1(math.log(perplexity) - loss)
    return {"perplexity_base": round(math.exp(loss), 4), "perplexity_base_increase": round(increase, 5)}


def _seen(ask: Ask, kept: torch.Tensor | None) -> Ask:
    """`ask` in the tokens of a trimmed vocabulary: the same pieces go in, and the others' answers are left out."""
    if kept is None:
        return ask
    return lambda row: ask(kept[row])[..., kept]


def _in_old_tokens(
    old: Ask, before: list[torch.Tensor], after: list[torch.Tensor], perplexity: float
) -> dict[str, Any]:
    """Perplexity of the same text per token of the original vocabulary: a smaller one needs more tokens for it.

    KL and top-1 stay as they are, on the same pieces and the tokens that both have.
    """
    original = _loss(map(old, before), before)
    ratio = sum(row.shape[1] for row in after) / sum(row.shape[1] for row in before)
    now = math.log(perplexity) * ratio
    return {
        "perplexity_original": round(math.exp(original), 4),
        "perplexity": round(math.exp(now), 4),
        "perplexity_increase": round(math.expm1(now - original), 5),
        "tokens_ratio": round(ratio, 4),
    }


def _loss(answers: Iterable[torch.Tensor], rows: list[torch.Tensor]) -> float:
    """Mean negative log-likelihood of the next token, nats, over windows (1, tokens) of the same length."""
    loss = 0.0
    for answer, row in zip(answers, rows, strict=True):
        loss -= float(log_softmax(answer[0, :-1], -1).gather(-1, row[0, 1:, None]).mean())
    return loss / len(rows)


def _cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    """Of all numbers together, summed in float64: float32 gives more than 1 for millions of them."""
    product, left, right = (
        float((a * b).sum(-1, dtype=torch.float64).sum()) for a, b in ((one, other), (one, one), (other, other))
    )
    size = math.sqrt(left * right)
    return max(-1.0, min(1.0, product / size)) if size else 0.0


def _effect(
    old: Any, new: Any, original: Path, rewritten: Path, rows: list[torch.Tensor], kept: torch.Tensor | None
) -> dict[str, float]:
    """What the adapter does to the new base, as it is now, against what it did to the old one."""
    divergence = moved = cosine = same = 0.0
    with adapted(old, original) as before, adapted(new, rewritten) as after:
        ask = _seen(partial(logits, before), kept)
        for row in rows:
            with before.disable_adapter(), after.disable_adapter():
                old_base, new_base = ask(row)[0], logits(after, row)[0]
            old_both, new_both = ask(row)[0], logits(after, row)[0]
            base_log, old_log, new_log = (log_softmax(each, -1) for each in (old_base, old_both, new_both))
            divergence += float((old_log.exp() * (old_log - new_log)).sum(-1).mean())
            moved += float((base_log.exp() * (base_log - old_log)).sum(-1).mean())
            same += float((old_both.argmax(-1) == new_both.argmax(-1)).float().mean())
            cosine += _cosine(old_both - old_base, new_both - new_base)
    count = len(rows)
    return {
        "kl": round(divergence / count, 5),
        "kl_to_base": round(moved / count, 5),
        "top1": round(same / count, 5),
        "cosine": round(cosine / count, 5),
    }


def _answer(ask: Ask, words: Any, prompt: str) -> str:
    """A greedy answer, in the chat template where there is one."""
    if words.chat_template:
        text_in = words.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
    else:
        text_in = prompt
    # As vLLM: a chat template writes special tokens itself, a plain prompt gets them from the tokenizer.
    ids = words(text_in, add_special_tokens=not words.chat_template, return_tensors="pt").input_ids.to(
        torch.get_default_device()
    )
    start = ids.shape[1]
    for _ in range(ANSWER):
        token = ask(ids)[0, -1].argmax()
        if int(token) == words.eos_token_id:
            break
        ids = torch.cat([ids, token.view(1, 1)], 1)
    answer: str = words.decode(ids[0, start:], skip_special_tokens=True)
    return answer.strip()
