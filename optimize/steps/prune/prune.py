"""Fewer layers or a narrower MLP: smaller and faster everywhere, and worse until it is healed. Zeros are made in
`sparse.py`, and `vocabulary.py` trims tokens.

Block influence (Men et al., 2024, arXiv 2403.03853) is how much a layer turns its input: one minus the mean cosine of
input and output. The layers of least influence are candidates, and dropped is, one after another, the one without
which calibration text is predicted best, so that the choice takes account of those already gone. The MLP keeps
the channels whose activations, times the size of their row of down_proj, are largest.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cosine_similarity, cross_entropy

from optimize.checkpoint import architectures
from optimize.checkpoint.checkpoint import Checkpoint, Writer
from optimize.checkpoint.model import answered, configured, entered, layers, opened, prefix, settle, through
from optimize.errors import OptimizeError
from optimize.job import Job, Progress
from optimize.steps.calibrated import windows
from optimize.steps.planning import BATCH
from optimize.steps.prune import sparse, vocabulary
from optimize.steps.prune.rules import SPARE, TRIED, WATCHED


def run(job: Job, progress: Progress) -> dict[str, Any]:
    if job.options["sparsity"] or job.options["pattern"]:
        return sparse.run(job, progress)
    if job.options["vocabulary"]:
        return vocabulary.run(job, progress)
    settle(job.seed, job.device)
    folder = Path(job.model)
    ids = torch.tensor(windows(job))
    checkpoint = Checkpoint(folder)
    model = opened(folder)
    name = prefix(model)
    notes: dict[str, Any] = {"parameters_before": checkpoint.parameters}
    config = dict(checkpoint.config)
    dropped: list[int] = []
    kept: dict[int, torch.Tensor] = {}
    count = len(layers(model))
    if job.options["layers"]:
        influence = _influence(model, ids[:WATCHED], progress)
        _finite(influence)
        least = sorted(range(count), key=lambda at: influence[at])
        least, notes["losses_without"] = _greedy(
            model, ids[:TRIED], least[: job.options["layers"] + SPARE], job.options["layers"], progress
        )
        dropped = sorted(least[: job.options["layers"]])
        notes |= {"influence": [round(value, 5) for value in influence], "dropped": dropped}
        config = architectures.without(config, configured(folder).to_dict(), dropped)
    if job.options["mlp"] < 1:
        width = max(64, round(config["intermediate_size"] * job.options["mlp"] / 64) * 64)
        kept = _channels(model, ids, width, progress)
        config["intermediate_size"] = width
        notes["mlp"] = width
    writer = Writer(job.folder / "model", folder)
    places = {old: new for new, old in enumerate(at for at in range(count) if at not in dropped)}
    for tensor in checkpoint.entries:
        if not tensor.startswith(name + "."):
            writer.add(tensor, checkpoint.tensor(tensor))
            continue
        number, _, rest = tensor.removeprefix(name + ".").partition(".")
        if int(number) in places:
            value = checkpoint.tensor(tensor)
            if int(number) in kept and ".mlp." in f".{rest}":
                value = _narrowed(rest, value, kept[int(number)])
            writer.add(f"{name}.{places[int(number)]}.{rest}", value)
    writer.close(config)
    notes["parameters"] = Checkpoint(job.folder / "model").parameters
    return notes


def _finite(measured: list[float]) -> None:
    """Refuse to choose by NaN or infinity."""
    if bad := [at for at, value in enumerate(measured) if not math.isfinite(value)]:
        raise OptimizeError(
            f"layer {bad[0]} gives NaN or infinity on the calibration text: the weights are broken, or the text is none"
        )


def _narrowed(rest: str, value: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    if "down_proj" in rest:
        return value[:, keep] if value.dim() == 2 else value
    if "gate_up_proj" in rest:  # both in one, gate first
        keep = torch.cat([keep, keep + len(value) // 2])
    return value[keep]


@torch.inference_mode()
def _influence(model: nn.Module, ids: torch.Tensor, progress: Progress) -> list[float]:
    influence = [0.0] * len(layers(model))
    batches = ids.split(BATCH)

    def watch(at: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = out[0] if isinstance(out, tuple) else out
            influence[at] += (1 - float(cosine_similarity(before.float(), after.float(), dim=-1).mean())) / len(batches)

        return hook

    hooks = [layer.register_forward_hook(watch(at), with_kwargs=True) for at, layer in enumerate(layers(model))]
    for done, batch in enumerate(batches):
        progress(done, len(batches), "block influence")
        model(input_ids=batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return influence


@torch.inference_mode()
def _greedy(
    model: nn.Module, ids: torch.Tensor, candidates: list[int], count: int, progress: Progress
) -> tuple[list[int], list[float]]:
    """The layers to drop, in that order, and the loss after each."""
    whole = list(layers(model))
    first = entered(model, ids, 1)
    gone: list[int] = []
    losses: list[float] = []
    tries = sum(len(candidates) - done for done in range(count))
    while len(gone) < count:
        before = first
        at = 0
        losses_without = {}
        for candidate in sorted(set(candidates) - set(gone)):
            before = through([whole[other] for other in range(at, candidate) if other not in gone], before)
            at = candidate
            after = through([whole[other] for other in range(at + 1, len(whole)) if other not in gone], before)
            losses_without[candidate] = sum(
                float(cross_entropy(answered(model, state).float()[0, :-1], row[1:]))
                for state, row in zip(after.states, ids, strict=True)
            ) / len(ids)
            progress(
                sum(len(candidates) - done for done in range(len(gone))) + len(losses_without), tries, "greedy choice"
            )
        best = min(losses_without, key=lambda candidate: losses_without[candidate])
        gone.append(best)
        losses.append(round(losses_without[best], 5))
    return gone, losses


@torch.inference_mode()
def _channels(model: nn.Module, ids: torch.Tensor, width: int, progress: Progress) -> dict[int, torch.Tensor]:
    """layer -> the channels to keep, in their order."""
    sums: dict[int, torch.Tensor] = {}
    batches = ids.split(BATCH)

    def watch(at: int) -> Any:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            made = inputs[0].float().square().flatten(0, -2).sum(0)
            sums[at] = sums[at] + made if at in sums else made

        return hook

    decoder = layers(model)
    hooks = [layer.mlp.down_proj.register_forward_pre_hook(watch(at)) for at, layer in enumerate(decoder)]
    for done, batch in enumerate(batches):
        progress(done, len(batches), "MLP channels")
        model(input_ids=batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    kept = {}
    for at, layer in enumerate(decoder):
        _finite([float(channels.sum()) for channels in sums.values()])
        heavy = sums[at].sqrt() * layer.mlp.down_proj.weight.float().norm(dim=0)
        kept[at] = heavy.topk(width).indices.sort().values
    return kept
