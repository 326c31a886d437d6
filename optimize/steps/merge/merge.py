"""LoRA adapters into the base's weights: tensor by tensor, in fp32, cast once at the end.

    LoRA    W + s B A,   s = alpha / r, or alpha / sqrt(r) with rsLoRA; with lora_bias the base's bias gets s b
    DoRA    m (W + s B A) / ||W + s B A||, a norm for each output row
    modules_to_save replace their module

A model whose output layer is its embedding is untied when an adapter changes one of the two alone. The result is held
against base + adapter through PEFT on probe text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from optimize.checkpoint import formats, lora_config
from optimize.checkpoint.checkpoint import Checkpoint, Writer, adapter_config, adapter_tensors
from optimize.checkpoint.model import settle
from optimize.errors import OptimizeError, Refused
from optimize.job import Job, Progress
from optimize.steps.merge.check import checked

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LAST_PLACES = 1.0  # of bf16: rounding to the nearest is off by half of one


@dataclass(frozen=True)
class Adapter:
    """One adapter's tensors by the base's modules, and how much of it is added."""

    name: str
    config: dict[str, Any]
    lora: dict[str, dict[str, torch.Tensor]]
    saved: dict[str, torch.Tensor]
    weight: float = 1.0

    def scale(self, module: str) -> float:
        return self.weight * lora_config.scale(self.config, module)

    def update(self, module: str) -> torch.Tensor:
        """s B A in fp32, in the shape of the module's weight."""
        parts = self.lora[module]
        if "embedding_A" in parts:
            made = (parts["embedding_B"].float() @ parts["embedding_A"].float()).T
        else:
            made = parts["B"].float() @ parts["A"].float()
        return self.scale(module) * (made.T if self.config.get("fan_in_fan_out") else made)


def run(job: Job, progress: Progress) -> dict[str, Any]:
    settle(job.seed, job.device)
    names = job.options["adapters"]
    weights = job.options["weights"] or [1.0] * len(names)
    adapters = [read(name, Path(job.adapters[name]), weight) for name, weight in zip(names, weights, strict=True)]
    merged_into(Path(job.model), adapters, job.folder / "model", progress)
    progress(1, 2, "checking against base + adapter")
    found = checked(job, names, weights)
    # NaN is beyond it too.
    if not found["weights_off_in_last_places"] <= LAST_PLACES:
        raise OptimizeError(
            f"the merged weights are up to {found['weights_off_in_last_places']:g} of bf16's last places from PEFT's "
            f"merge of {', '.join(names)}, where rounding gives 0.5: PEFT reads these adapters in another way"
        )
    scores = {"merge_kl": found["kl_to_base_plus_adapter"]}
    return {"adapters": names, "weights": weights, **found, "scores": scores}


def read(name: str, folder: Path, weight: float = 1.0) -> Adapter:
    """The adapter in a PEFT folder."""
    config = adapter_config(folder)
    lora: dict[str, dict[str, torch.Tensor]] = {}
    saved: dict[str, torch.Tensor] = {}
    for tensor, value in adapter_tensors(folder).items():
        module, separator, part = tensor.removeprefix("base_model.model.").partition(".lora_")
        if module.endswith(".base_layer.weight"):
            continue  # PEFT saves the embedding that an adapter lies over, as it was
        if not separator:
            saved[module] = value
        else:
            lora.setdefault(module, {})[part.removesuffix(".weight").removesuffix(".default")] = value
    return Adapter(name, config, lora, saved, weight)


def merged_into(
    base: Path, adapters: Sequence[Adapter], out: Path, progress: Progress, shard_bytes: int = 4_000_000_000
) -> None:
    """The checkpoint of base plus adapters, written to `out`."""
    checkpoint = Checkpoint(base)
    config = {name: value for name, value in checkpoint.config.items() if name != "quantization_config"}
    names = list(checkpoint.shapes)
    touched = {f"{module}.weight" for adapter in adapters for module in adapter.lora}
    touched |= {f"{module}.bias" for adapter in adapters for module, of in adapter.lora.items() if "B.bias" in of}
    touched |= {name for adapter in adapters for name in adapter.saved}
    weights: Iterable[tuple[str, torch.Tensor]] = formats.dense(checkpoint)
    dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "bfloat16"))
    if checkpoint.tied and touched & {EMBEDDING, HEAD}:
        names.append(HEAD)
        weights = chain(weights, [(HEAD, checkpoint.tensor(EMBEDDING))])
        config["tie_word_embeddings"] = False
    if unknown := touched - set(names):
        raise Refused(f"an adapter is for another base: this one has no {sorted(unknown)[0]}")
    writer = Writer(out, base, shard_bytes)
    for done, (name, tensor) in enumerate(weights):
        kind = tensor.dtype if checkpoint.quantization is None else dtype
        writer.add(name, _merged(name, tensor, adapters, kind) if name in touched else tensor.to(kind).clone())
        progress(done, 2 * len(names), name)
    writer.close(config)


def _merged(name: str, tensor: torch.Tensor, adapters: Sequence[Adapter], dtype: torch.dtype) -> torch.Tensor:
    module, _, leaf = name.rpartition(".")
    wide = tensor.float()
    for adapter in adapters:
        if name in adapter.saved:
            if adapter.saved[name].shape != wide.shape:
                raise Refused(
                    f"{adapter.name} saves {name} as {list(adapter.saved[name].shape)}, "
                    f"the base has {list(wide.shape)}: another base"
                )
            wide = adapter.saved[name].float()
        if leaf == "bias" and module in adapter.lora:
            wide = wide + adapter.scale(module) * adapter.lora[module]["B.bias"].float()
        elif module in adapter.lora:
            update = adapter.update(module)
            if update.shape != wide.shape:
                raise Refused(
                    f"{adapter.name} changes {name} in shape {list(update.shape)}, the base has {list(wide.shape)}"
                )
            wide = wide + update
            if "magnitude_vector" in adapter.lora[module]:
                magnitude = adapter.lora[module]["magnitude_vector"].float().flatten()
                wide = wide * (magnitude / wide.norm(dim=1))[:, None]
    made = wide.to(dtype)
    if not bool(made.isfinite().all()):
        raise OptimizeError(
            f"merging gives NaN or infinity in {name}: look at the adapters {', '.join(a.name for a in adapters)}"
        )
    return made
