"""Mixed precision: which layers keep more bits, so that the whole stays within bounds.

The bounds are `budget` for perplexity and `agreement` for the likeliest token. Where everything at the lowest level
costs more, every unit is measured by itself, at each level that it could have, by the KL divergence of the model's
answer, and bits are given back where a byte buys the most, until the calibration text is answered within both bounds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import log_softmax

from optimize.checkpoint import formats
from optimize.checkpoint.formats import FULL, W4, W8A8, W8A16, Level
from optimize.checkpoint.model import Entered, entered, rounding, through

if TYPE_CHECKING:
    from optimize.steps.quantize.quantizer import Quantizer, Unit

BATCH = 4
PROBED = 256  # tokens that sensitivity is measured on
SAFETY = 0.85  # of the budget, since the gate measures on other text
TRIED = 8  # windows that a mix is tried on
ROUNDS = 5


def mixed(
    quantizer: Quantizer,
    low: Level,
    target: str,
    budget: float,
    agreement: float,
    factors: dict[str, torch.Tensor],
    partial: Path,
) -> tuple[dict[Unit, Level], dict[str, Any]]:
    """Which unit gets which level so that perplexity rises by no more than `budget` and the likeliest token stays in
    at least `agreement` of the places."""
    high = W8A8 if target == "cpu" else W8A16
    ladder = [low, high, FULL] if low is W4 else [low, FULL]
    held = quantizer.ids[:TRIED]
    wanted = quantizer.log_probabilities(held).bfloat16()
    before = spent_on(wanted, held)
    allowed = math.log1p(budget or math.inf) * SAFETY
    differ = (1 - agreement) * (1 - (1 - SAFETY) / 8)
    tried: list[dict[str, Any]] = []
    elements = {unit: sum(quantizer.linear(name).weight.numel() for name in unit.names) for unit in quantizer.units}

    def weighs(mix: dict[Unit, Level]) -> float:
        return sum(level.bytes(elements[unit], quantizer.group or 1) for unit, level in mix.items())

    best, bound, fits, fails = dict.fromkeys(quantizer.units, ladder[-1]), 0.0, 0.0, 0.0
    chosen = dict.fromkeys(quantizer.units, low)
    measured: dict[str, dict[str, float]] = {}
    costs: dict[str, dict[str, float]] = {}
    for round_ in range(ROUNDS):
        after = answered(quantizer, chosen, factors, held, f"trying mix {round_ + 1}")
        spent = spent_on(after, held) - before
        apart = float((after.argmax(-1) != wanted.argmax(-1)).float().mean())
        del after
        lowest = sum(level is low for level in chosen.values())
        tried.append({low.name: lowest, "log_perplexity": round(spent, 5), "top1": round(1 - apart, 5)})
        # Log-perplexity grows with the KL divergence, differing tokens with its square root.
        over = max(spent / allowed, (apart / differ) ** 2)
        if over <= 1:
            best, fits = min(best, chosen, key=weighs), bound
            if over > 0.75 or lowest == len(chosen):
                break
        else:
            fails = bound
        if not costs:
            measured = effects(quantizer, ladder[:-1], factors, partial)
            # Whatever changes at all changes bf16's rounding after it: every unit shows that much, and it is no effect.
            floor = min(cost for found in measured.values() for cost in found.values())
            costs = {
                label: {name: cost - 0.95 * floor for name, cost in found.items()} for label, found in measured.items()
            }
            fails = bound = sum(found[low.name] for found in costs.values())
        # Effects do not add up exactly: by proportion at first, in the middle once there is one on either side.
        bound = (fits * fails) ** 0.5 if fits else bound / (1.05 * over)
        chosen = choice(quantizer, ladder, costs, bound)
    sensitivity = {label: {name: round(value, 6) for name, value in found.items()} for label, found in measured.items()}
    return best, {"sensitivity": sensitivity, "tried": tried, "budget": budget, "agreement": agreement}


def spent_on(said: torch.Tensor, ids: torch.Tensor) -> float:
    """Mean negative log-likelihood of the next token, nats; `said` is (rows, tokens, vocabulary)."""
    return -float(said[:, :-1].gather(-1, ids[:, 1:, None]).float().mean())


def answered(
    quantizer: Quantizer, chosen: Mapping[Unit, Level], factors: Mapping[str, torch.Tensor], ids: torch.Tensor, say: str
) -> torch.Tensor:
    """What the model answers, quantized so, (rows, tokens, vocabulary); afterwards the quantizer has the full model.

    Eight bits are rounded to the nearest here, which is a little worse than GPTQ and takes a tenth of the time.
    """
    method, active = quantizer.method, quantizer.active(chosen, factors)
    few = all(level.bits >= 8 for level in chosen.values())
    quantizer.method = "rtn" if few else method
    try:
        for _ in quantizer.rounded(chosen, active, say, windows=1 if few else TRIED):
            pass
        for unit, level in chosen.items():
            for name in unit.names if level.activations else ():
                quantizer.linear(name).register_forward_pre_hook(rounding(formats.group_config(level, 0)))
        return quantizer.log_probabilities(ids).bfloat16()
    finally:
        quantizer.method = method
        quantizer.reopen()


def choice(
    quantizer: Quantizer, ladder: Sequence[Level], costs: Mapping[str, Mapping[str, float]], allowed: float
) -> dict[Unit, Level]:
    """Begin low and give back, one rung at a time, where a byte buys the most, until the sum is allowed."""
    elements = {unit: sum(quantizer.linear(name).weight.numel() for name in unit.names) for unit in quantizer.units}
    rung = dict.fromkeys(quantizer.units, 0)

    def cost(unit: Unit, at: int) -> float:
        return 0.0 if ladder[at] is FULL else costs[unit.label][ladder[at].name]

    def gain(unit: Unit, to: int) -> float:
        more = ladder[to].bytes(elements[unit], quantizer.group or 1) - ladder[rung[unit]].bytes(
            elements[unit], quantizer.group or 1
        )
        return (cost(unit, rung[unit]) - cost(unit, to)) / more

    total = sum(cost(unit, 0) for unit in quantizer.units)
    while total > allowed:
        steps = [
            (gain(unit, to), -at, unit, to)
            for at, unit in enumerate(quantizer.units)
            for to in range(rung[unit] + 1, len(ladder))
        ]
        if not steps:
            break
        _, _, unit, to = max(steps, key=lambda step: step[:2])
        total -= cost(unit, rung[unit]) - cost(unit, to)
        rung[unit] = to
    return {unit: ladder[at] for unit, at in rung.items()}


def effects(
    quantizer: Quantizer, levels: Sequence[Level], factors: Mapping[str, torch.Tensor], partial: Path
) -> dict[str, dict[str, float]]:
    """unit -> level -> KL, nats a token, of the answer with that unit alone rounded to the nearest."""
    file = partial / "sensitivity.json"
    found: dict[str, dict[str, float]] = json.loads(file.read_text()) if file.is_file() else {}
    probe = quantizer.ids[-1:, :PROBED]
    begun = entered(quantizer.model, probe, BATCH)
    wanted = quantizer.log_probabilities(probe)
    count = len(quantizer.layers)
    for at, layer in enumerate(quantizer.layers):
        quantizer.progress(at, count, f"sensitivity, layer {at + 1} of {count}")
        for unit in quantizer.units:
            if unit.layer != at or unit.label in found:
                continue
            touched = [*unit.names, quantizer.producer(unit.names[0])] if unit.names[0] in factors else list(unit.names)
            full = {name: quantizer.linear(name).weight for name in touched}
            result = {}
            for level in levels:
                quantizer.smooth(at, quantizer.active({unit: level}, factors))
                for name, its in quantizer.round(unit, level, None).items():
                    quantizer.linear(name).weight = nn.Parameter(its.dense.to(quantizer.dtype), requires_grad=False)
                hooks = [
                    quantizer.linear(name).register_forward_pre_hook(rounding(formats.group_config(level, 0)))
                    for name in unit.names
                    if level.activations
                ]
                result[level.name] = _divergence(quantizer, at, begun, wanted)
                for hook in hooks:
                    hook.remove()
                for name, weight in full.items():
                    quantizer.linear(name).weight = weight
            found[unit.label] = result
        aside = file.with_suffix(".part")
        aside.write_text(json.dumps(found))
        aside.rename(file)
        with torch.inference_mode():
            begun = through([layer], begun)
    return found


@torch.inference_mode()
def _divergence(quantizer: Quantizer, at: int, begun: Entered, wanted: torch.Tensor) -> float:
    """Mean KL(original || now) over the probe's tokens, running from layer `at` on."""
    total = 0.0
    hidden = torch.cat(through(list(quantizer.layers[at:]), begun).states)
    body = quantizer.model.get_submodule(quantizer.prefix.rpartition(".")[0])
    for row, right in zip(hidden, wanted, strict=True):
        said = log_softmax(quantizer.model.lm_head(body.norm(row)).float(), -1)
        total += float(torch.sub(right, said).mul_(right.exp()).sum(-1).mean())
    return max(total / len(hidden), 0.0)
