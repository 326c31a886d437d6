"""Mixed precision: which layers keep more bits, so that the whole stays within bounds.

The bounds are `budget` for perplexity and `agreement` for the likeliest token, or `bits` a weight for the size. Every
unit is measured by itself, at each level that it could have, by the KL divergence of the model's answer. Bits are given
back where a byte buys the most: until the calibration text is answered within the first two bounds, if everything at
the lowest level is not, or as long as they fit into the third.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from optimize.checkpoint import artifact
from optimize.checkpoint.formats import FULL, W4, W8A8, W8A16, Level
from optimize.checkpoint.model import Entered, entered, through
from optimize.steps.calibrated import CalibratedModel, Unit
from optimize.steps.planning import BATCH
from optimize.steps.quantize.channel_scales import ChannelScales
from optimize.steps.quantize.quantizer import Quantizer
from optimize.steps.quantize.rules import PROBED, TRIED

SAFETY = 0.85  # of the budget, since the gate measures on other text
ROUNDS = 5
Costs = dict[str, dict[str, float]]  # unit -> level -> KL, nats a token


def mixed(
    quantizer: Quantizer,
    low: Level,
    target: str,
    budget: float,
    agreement: float,
    scales: ChannelScales,
    partial: Path,
) -> tuple[dict[Unit, Level], dict[str, Any]]:
    """Which unit gets which level so that perplexity rises by no more than `budget` and the likeliest token stays in
    at least `agreement` of the places."""
    model = quantizer.model
    ladder = _ladder(low, target)
    ids = model.ids[:TRIED]
    original = model.log_probabilities(ids).bfloat16()
    loss = mean_loss(original, ids)
    loss_bound = math.log1p(budget or math.inf) * SAFETY
    differing_bound = (1 - agreement) * (1 - (1 - SAFETY) / 8)
    best, chosen = dict.fromkeys(model.units, ladder[-1]), dict.fromkeys(model.units, low)
    bound = fits = fails = 0.0
    tried: list[dict[str, Any]] = []
    measured: Costs = {}
    costs: Costs = {}
    for round_ in range(ROUNDS):
        answers = quantizer.answers(chosen, scales.active(chosen), ids, f"trying mix {round_ + 1}")
        rise = mean_loss(answers, ids) - loss
        differing = float((answers.argmax(-1) != original.argmax(-1)).float().mean())
        del answers
        lowest = sum(level is low for level in chosen.values())
        tried.append({low.name: lowest, "log_perplexity": round(rise, 5), "top1": round(1 - differing, 5)})
        # Log-perplexity grows with the KL divergence, differing tokens with its square root.
        over = max(rise / loss_bound, (differing / differing_bound) ** 2)
        if over <= 1:
            best, fits = min(best, chosen, key=lambda mix: _bytes(quantizer, mix)), bound
            if over > 0.75 or lowest == len(chosen):
                break
        else:
            fails = bound
        if not costs:
            measured = effects(quantizer, ladder[:-1], scales, partial)
            costs = _above_floor(measured)
            fails = bound = sum(of_unit[low.name] for of_unit in costs.values())
        # Effects do not add up exactly: by proportion at first, in the middle once there is one on either side.
        bound = (fits * fails) ** 0.5 if fits else bound / (1.05 * over)
        chosen = choice(quantizer, ladder, costs, bound)
    return best, {"sensitivity": _shown(measured), "tried": tried, "budget": budget, "agreement": agreement}


def within(
    quantizer: Quantizer, low: Level, target: str, bits: float, scales: ChannelScales, partial: Path
) -> tuple[dict[Unit, Level], dict[str, Any]]:
    """Which unit gets which level so that the least is lost in `bits` a weight on average, scales included."""
    ladder = _ladder(low, target)
    measured = effects(quantizer, ladder[:-1], scales, partial)
    room = bits / 8 * sum(quantizer.model.elements(unit) for unit in quantizer.model.units)
    chosen = choice(quantizer, ladder, _above_floor(measured), 0.0, room)
    taken = 8 * _bytes(quantizer, chosen) / (room / bits * 8)
    return chosen, {"sensitivity": _shown(measured), "bits": bits, "bits_taken": round(taken, 4)}


def _ladder(low: Level, target: str) -> list[Level]:
    return [low, W8A8 if target == "cpu" else W8A16, FULL] if low is W4 else [low, FULL]


def _shown(measured: Costs) -> Costs:
    return {label: {name: round(cost, 6) for name, cost in of_unit.items()} for label, of_unit in measured.items()}


def _bytes(quantizer: Quantizer, mix: Mapping[Unit, Level]) -> float:
    return sum(level.bytes(quantizer.model.elements(unit), quantizer.group or 1) for unit, level in mix.items())


def _above_floor(measured: Costs) -> Costs:
    """Whatever changes at all changes bf16's rounding after it: every unit shows that much, and it is no effect."""
    floor = min(cost for of_unit in measured.values() for cost in of_unit.values())
    return {label: {name: cost - 0.95 * floor for name, cost in of_unit.items()} for label, of_unit in measured.items()}


def mean_loss(log_probabilities: torch.Tensor, ids: torch.Tensor) -> float:
    """Mean negative log-likelihood of the next token, nats; `log_probabilities` is (rows, tokens, vocabulary)."""
    return -float(log_probabilities[:, :-1].gather(-1, ids[:, 1:, None]).float().mean())


def choice(
    quantizer: Quantizer,
    ladder: Sequence[Level],
    costs: Mapping[str, Mapping[str, float]],
    bound: float,
    room: float = math.inf,
) -> dict[Unit, Level]:
    """Begin low and give back, one rung at a time, where a byte buys the most, until the sum of costs is in bounds or
    no step fits into `room` bytes."""
    units = quantizer.model.units
    elements = {unit: quantizer.model.elements(unit) for unit in units}
    rung = dict.fromkeys(units, 0)

    def cost(unit: Unit, at: int) -> float:
        return 0.0 if ladder[at] is FULL else costs[unit.label][ladder[at].name]

    def size(unit: Unit, at: int) -> float:
        return ladder[at].bytes(elements[unit], quantizer.group or 1)

    def gain(unit: Unit, to: int) -> float:
        return (cost(unit, rung[unit]) - cost(unit, to)) / (size(unit, to) - size(unit, rung[unit]))

    total, taken = sum(cost(unit, 0) for unit in units), sum(size(unit, 0) for unit in units)
    while total > bound:
        steps = [
            (gain(unit, to), -at, unit, to)
            for at, unit in enumerate(units)
            for to in range(rung[unit] + 1, len(ladder))
            if cost(unit, to) < cost(unit, rung[unit]) and taken - size(unit, rung[unit]) + size(unit, to) <= room
        ]
        if not steps:
            break
        _, _, unit, to = max(steps, key=lambda step: step[:2])
        total -= cost(unit, rung[unit]) - cost(unit, to)
        taken += size(unit, to) - size(unit, rung[unit])
        rung[unit] = to
    return {unit: ladder[at] for unit, at in rung.items()}


def effects(quantizer: Quantizer, levels: Sequence[Level], scales: ChannelScales, partial: Path) -> Costs:
    """What the answer loses with each unit alone rounded to the nearest; `partial` keeps it for a killed run."""
    file = partial / "sensitivity.json"
    measured: Costs = json.loads(file.read_text()) if file.is_file() else {}
    model = quantizer.model
    probe = model.ids[-1:, :PROBED]
    begun = entered(model.model, probe, BATCH)
    original = model.log_probabilities(probe)
    count = len(model.layers)
    for at, layer in enumerate(model.layers):
        quantizer.progress(at, count, f"sensitivity, layer {at + 1} of {count}")
        for unit in model.units_of(at):
            if unit.label in measured:
                continue
            of_unit = {}
            for level in levels:
                with quantizer.alone(unit, level, scales.active({unit: level})):
                    of_unit[level.name] = _divergence(model, at, begun, original)
            measured[unit.label] = of_unit
        with artifact.replaced(file) as out:
            out.write(json.dumps(measured).encode())
        with torch.inference_mode():
            begun = through([layer], begun)
    return measured


@torch.inference_mode()
def _divergence(model: CalibratedModel, layer: int, begun: Entered, original: torch.Tensor) -> float:
    """Mean KL(original || now) over the probe's tokens, running from `layer` on."""
    divergences = [
        float(torch.sub(right, now).mul_(right.exp()).sum(-1).mean())
        for right, now in zip(original, model.log_probabilities_from(layer, begun), strict=True)
    ]
    return max(sum(divergences, 0.0) / len(divergences), 0.0)
