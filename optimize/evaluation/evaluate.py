"""Measure the result on held-out tokens, against the model that it came from.

Perplexity of both, the mean KL divergence and the share of tokens with the same likeliest successor, what each
adapter still does on the new base, and some answers side by side.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import log_softmax

from optimize.checkpoint.checkpoint import Checkpoint
from optimize.checkpoint.model import adapted, answered, greedy, last_states, logits, opened, settle
from optimize.errors import OptimizeError
from optimize.evaluation.held_out import HeldOut, held_out, own_text
from optimize.evaluation.perplexity import increase, perplexity
from optimize.evaluation.rules import ADAPTED, ANSWER
from optimize.intervals import of_mean
from optimize.job import Job, Progress
from optimize.steps import planning

CACHED = 1 << 18  # numbers that are compared at a time: they stay in the processor's cache
Ask = Callable[[torch.Tensor], torch.Tensor]
Say = Callable[[Sequence[list[int]], int, int | None], list[list[int]]]


def run(job: Job, progress: Progress) -> dict[str, Any]:
    settle(job.seed, job.device)
    reference = Path(job.reference)
    text = held_out(job)
    kept = text.kept
    rows = text.result
    in_onnx = job.options["format"] == "onnx"
    by_layer = planning.by_layer(
        planning.weight_bytes() * sum(map(math.prod, Checkpoint(reference).shapes.values())), job.memory
    )
    base_loss = _base_loss(Path(job.base), text.original, by_layer) if job.base != job.reference else None
    old = opened(reference, by_layer=by_layer)
    scores: dict[str, Any] = {}
    if in_onnx:
        from optimize.export.session import Session

        new: Any = None
        session = Session(Path(job.model))
        ask: Ask = session.logits
    else:
        # An adapter is put around each of them, and around one model it would be there twice.
        same = job.model == job.reference and not job.adapters
        new = old if same else opened(Path(job.model), by_layer=by_layer)
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
        scores["intervals"].pop("perplexity_increase", None)  # of other windows
    if base_loss is not None:
        rise = math.log(scores["perplexity"]) - base_loss
        scores |= {"perplexity_base": perplexity(base_loss), "perplexity_base_increase": increase(rise)}
    effects = {}
    done = len(rows)
    for name in living:
        places = Path(job.originals[name]), Path(job.adapters[name])
        own = own_text(job, text, name, ADAPTED) or rows[:ADAPTED]
        effects[name] = {**_effect(old, new, *places, own, kept), "own_text": name in job.evaluate.adapter_texts}
        done += 2 * min(ADAPTED, len(rows))
        progress(done, total, f"adapter {name}")
    if effects:
        scores["adapters"] = effects
        _add_worst(scores, effects)
    say = session.greedy if in_onnx else partial(greedy, new)
    scores["samples"] = _samples(job, partial(greedy, old), say, new, text)
    if job.options["format"] != "onnx":
        before, after = Checkpoint(reference), Checkpoint(Path(job.model))
        scores["bytes_original"], scores["bytes"] = before.bytes, after.bytes
    else:
        scores["bytes_original"] = Checkpoint(reference).bytes
        scores["bytes"] = sum(file.stat().st_size for file in Path(job.model).glob("model.onnx*"))
    scores["size_ratio"] = round(scores["bytes"] / scores["bytes_original"], 4)
    return {"scores": scores}


def _samples(job: Job, say_old: Say, say: Say, new: Any, text: HeldOut) -> list[dict[str, Any]]:
    """What the original, the result and each adapter on it answer the recipe's prompts."""
    prompts = job.evaluate.prompts
    if not prompts:
        return []
    said = {"original": _said(say_old, text.words, prompts), "result": _said(say, text.new_words, prompts)}
    for name, folder in sorted(job.adapters.items()):
        with adapted(new, Path(folder)) as both:
            said[name] = _said(partial(greedy, both), text.new_words, prompts)
    answers = zip(*said.values(), strict=True)
    return [
        {"prompt": prompt, **dict(zip(said, line, strict=True))} for prompt, line in zip(prompts, answers, strict=True)
    ]


def _add_worst(scores: dict[str, Any], effects: dict[str, dict[str, Any]]) -> None:
    """The adapter that lost most counts, and of each interval the end that is worst."""
    for name, score, worst in (("worst_adapter_kl", "kl", max), ("worst_adapter_effect", "cosine", min)):
        scores[name] = worst(effect[score] for effect in effects.values())
        ends = [effect["intervals"][score] for effect in effects.values() if score in effect["intervals"]]
        if ends:
            scores["intervals"][name] = [worst(end) for end in zip(*ends, strict=True)]


def _answers(model: Any, rows: list[torch.Tensor], by_layer: bool) -> Iterator[torch.Tensor]:
    """The logits (1, tokens, vocabulary) of each row."""
    if not by_layer:
        yield from map(partial(logits, model), rows)
        return
    for state in last_states(model, rows, lambda _: None):
        yield _answered(model, state)


@torch.inference_mode()
def _answered(model: Any, state: torch.Tensor) -> torch.Tensor:
    return answered(model, state).float()


def compared(
    old: Iterable[torch.Tensor],
    new: Iterable[torch.Tensor],
    rows: list[torch.Tensor],
    progress: Callable[[int], None],
) -> dict[str, Any]:
    """Scores of `new` logits against `old` over windows of tokens, (1, tokens) each, one window at a time; `intervals`
    are where they lie for all windows like these."""
    losses: tuple[list[float], ...] = ([], [], [], [])
    before, after = iter(old), iter(new)
    for done, row in enumerate(rows):
        right_logits, logits_now = next(before), next(after)
        scored = zip(losses, _scores(right_logits[0, :-1], logits_now[0, :-1], row[0, 1:]), strict=True)
        for of_windows, of_tokens in scored:
            of_windows.append(float(of_tokens.mean()))
        # Neither is there while the next are made; in a tuple of zip's they would be.
        del right_logits, logits_now
        progress(done + 1)
    losses_old, losses_new, divergences, same = losses
    count = len(rows)
    loss_old, loss_new = sum(losses_old), sum(losses_new)
    rise = [new - old for new, old in zip(losses_new, losses_old, strict=True)]
    if not math.isfinite(loss_new):
        raise OptimizeError("the result answers with NaN or infinity on the held-out text: it is broken")
    return {
        "perplexity_original": perplexity(loss_old / count),
        "perplexity": perplexity(loss_new / count),
        "perplexity_increase": increase((loss_new - loss_old) / count),
        "log_perplexity": round(loss_new / count, 5),  # in the result's own tokens
        "kl": round(sum(divergences) / count, 5),
        "top1": round(sum(same) / count, 5),
        "intervals": {
            **_interval("kl", divergences), **_interval("top1", same),
            **_interval("perplexity_increase", rise, increase),
        },
    }  # fmt: skip


def _scores(old: torch.Tensor, new: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """(4, tokens): both losses, the divergence, and whether the likeliest is the same, of logits (tokens, vocabulary);
    a few tokens at a time, whose numbers are read once."""
    few = max(1, CACHED // old.shape[-1])
    made = []
    for before, after, tokens in zip(old.split(few), new.split(few), right[:, None].split(few), strict=True):
        same = before.argmax(-1) == after.argmax(-1)
        before, after = log_softmax(before, -1), log_softmax(after, -1)
        divergence = torch.linalg.vecdot(before.exp(), before - after)
        made.append(
            torch.stack([-before.gather(-1, tokens)[:, 0], -after.gather(-1, tokens)[:, 0], divergence, same.float()])
        )
    return torch.cat(made, 1)


def _interval(
    name: str, values: Sequence[float], made_of: Callable[[float], float] = lambda value: value
) -> dict[str, list[float]]:
    """From where to where a score lies, by its name; nothing of one window, which says nothing of others."""
    if len(values) < 2:
        return {}
    interval = of_mean(values)
    return {name: [round(made_of(end), 5) for end in (interval.low, interval.high)]}


def _base_loss(base: Path, rows: list[torch.Tensor], by_layer: bool) -> float:
    """Of the base without the adapters that were merged, which is gone before the other two models are opened."""
    loss = _loss(_answers(opened(base, by_layer=by_layer), rows, by_layer), rows)
    gc.collect()  # hooks that read a layer know it
    return loss


def _seen(ask: Ask, kept: torch.Tensor | None) -> Ask:
    """`ask` in the tokens of a trimmed vocabulary: the same pieces go in, and the others' answers are left out."""
    if kept is None:
        return ask
    return lambda row: ask(kept[row])[..., kept]


def _in_old_tokens(old: Ask, before: list[torch.Tensor], after: list[torch.Tensor], measured: float) -> dict[str, Any]:
    """Perplexity of the same text per token of the original vocabulary: a smaller one needs more tokens for it.

    KL and top-1 stay as they are, on the same pieces and the tokens that both have.
    """
    original = _loss(map(old, before), before)
    ratio = sum(row.shape[1] for row in after) / sum(row.shape[1] for row in before)
    now = math.log(measured) * ratio
    return {
        "perplexity_original": perplexity(original),
        "perplexity": perplexity(now),
        "perplexity_increase": increase(now - original),
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
) -> dict[str, Any]:
    """What the adapter does to the new base, as it is now, against what it did to the old one."""
    moved = same = 0.0
    divergences: list[float] = []
    cosines: list[float] = []
    with adapted(old, original) as before, adapted(new, rewritten) as after:
        ask = _seen(partial(logits, before), kept)
        for row in rows:
            with before.disable_adapter(), after.disable_adapter():
                old_base, new_base = ask(row)[0], logits(after, row)[0]
            old_both, new_both = ask(row)[0], logits(after, row)[0]
            base_log, old_log, new_log = (log_softmax(each, -1) for each in (old_base, old_both, new_both))
            divergences.append(float((old_log.exp() * (old_log - new_log)).sum(-1).mean()))
            moved += float((base_log.exp() * (base_log - old_log)).sum(-1).mean())
            same += float((old_both.argmax(-1) == new_both.argmax(-1)).float().mean())
            cosines.append(_cosine(old_both - old_base, new_both - new_base))
    count = len(rows)
    return {
        "kl": round(sum(divergences) / count, 5),
        "kl_to_base": round(moved / count, 5),
        "top1": round(same / count, 5),
        "cosine": round(sum(cosines) / count, 5),
        "intervals": {**_interval("kl", divergences), **_interval("cosine", cosines)},
    }


def _said(say: Say, words: Any, prompts: Sequence[str]) -> list[str]:
    """A greedy answer to each prompt, in the chat template where there is one."""
    texts = list(prompts)
    if words.chat_template:
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        texts = [words.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    # As vLLM: a chat template writes special tokens itself, a plain prompt gets them from the tokenizer.
    ids = [words(text, add_special_tokens=not words.chat_template).input_ids for text in texts]
    said = say(ids, ANSWER, words.eos_token_id)
    return [words.decode(answer, skip_special_tokens=True).strip() for answer in said]
