"""Several adapters into one, by PEFT's own methods where they compute what their names say.

The result is held against the exact weighted sum of the updates, sum_i w_i s_i B_i A_i: its relative error in the
Frobenius norm is stated, since most methods do not aim at that sum, and the sum itself is kept as an adapter, at the
sum of the ranks, for the evaluation to compare with. TIES, DARE and pruning go through PEFT's
arithmetic on the updates and then down to the rank. `linear` is weighted on one side only (B), which PEFT's own is
not: that one takes the square roots of the weights on both, and goes wrong for negative ones.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from optimize.checkpoint.checkpoint import ADAPTER_CONFIG, write_adapter
from optimize.checkpoint.model import settle
from optimize.errors import OptimizeError
from optimize.job import Job, Progress
from optimize.steps.merge.merge import Adapter, read

MEANS = {
    "linear": "the mean of the A and the weighted sum of the B, for adapters of one origin, whose A are alike: not the "
    "sum of their updates",
    "cat": "the exact weighted sum, at the sum of the ranks",
    "svd": "the best approximation of the weighted sum at the given rank",
    "ties": "the updates pruned to their largest, the majority's signs kept, at the given rank",
    "dare_linear": "the updates dropped at random and rescaled, summed, at the given rank",
    "dare_ties": "as ties, dropped at random and rescaled",
    "magnitude_prune": "the updates pruned to their largest, summed, at the given rank",
}

# What leaves out modules of those that `target_modules` names: the other adapters may have them.
NARROWER = {"layers_to_transform", "layers_pattern", "exclude_modules"}


def run(job: Job, progress: Progress) -> dict[str, Any]:
    settle(job.seed, job.device)
    options = job.options
    names = options["adapters"]
    weights = options["weights"] or [1.0] * len(names)
    adapters = [read(name, Path(job.adapters[name])) for name in names]
    rank = options["rank"] or max(int(adapter.config["r"]) for adapter in adapters)
    method = options["method"]
    modules = sorted({module for adapter in adapters for module in adapter.lora})
    tensors: dict[str, torch.Tensor] = {}
    exactly: dict[str, torch.Tensor] = {}
    off = whole = 0.0
    for done, module in enumerate(modules):
        progress(done, len(modules), module)
        having = [
            (adapter, weight) for adapter, weight in zip(adapters, weights, strict=True) if module in adapter.lora
        ]
        down, up = _combined(method, module, having, rank, options["density"], job.seed)
        exact = sum(weight * adapter.update(module) for adapter, weight in having)
        off += float((up @ down - exact).square().sum())
        whole += float(torch.as_tensor(exact).square().sum())
        prefix = f"base_model.model.{module}"
        tensors |= {f"{prefix}.lora_A.weight": down.contiguous(), f"{prefix}.lora_B.weight": up.contiguous()}
        down, up = _combined("cat", module, having, 0, 1.0, job.seed)
        exactly |= {f"{prefix}.lora_A.weight": down.contiguous(), f"{prefix}.lora_B.weight": up.contiguous()}
    if any(not bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise OptimizeError(f"{method} gives NaN or infinity: look at the adapters {', '.join(names)}")
    source = Path(job.adapters[names[0]])
    widest = _write(job.folder / "adapters" / options["name"], tensors, adapters[0], source, modules)
    _write(job.folder / "exact" / options["name"], exactly, adapters[0], source, modules)
    error = round((off / whole) ** 0.5 if whole else 0.0, 6)
    notes = {"method": method, "means": MEANS[method], "rank": widest, "weights": weights, "error": error}
    return {**notes, "scores": {"combine_error": error}}


def _combined(
    method: str, module: str, having: list[tuple[Adapter, float]], rank: int, density: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(A, B) of one module with the scale in B, in fp32."""
    downs = [adapter.lora[module]["A"].float() for adapter, _ in having]
    ups = [adapter.lora[module]["B"].float() * adapter.scale(module) for adapter, _ in having]
    weights = [weight for _, weight in having]
    if method == "cat":
        return torch.cat(downs), torch.cat([up * weight for up, weight in zip(ups, weights, strict=True)], 1)
    if method == "svd":
        # Exact and small: the product of two thin factors has the singular values of a matrix as small as its rank.
        left, right = torch.cat([up * weight for up, weight in zip(ups, weights, strict=True)], 1), torch.cat(downs)
        q_left, r_left = torch.linalg.qr(left)
        q_right, r_right = torch.linalg.qr(right.T)
        u, s, v = torch.linalg.svd(r_left @ r_right.T)
        keep = min(rank, len(s))
        root = s[:keep].sqrt()
        return (root[:, None] * v[:keep]) @ q_right.T, (q_left @ u[:, :keep]) * root
    if method == "linear":
        return torch.stack(downs).mean(0), torch.stack(
            [up * weight for up, weight in zip(ups, weights, strict=True)]
        ).sum(0)
    # On the updates themselves, as in the papers, and then down to the rank.
    updates = [up @ down for up, down in zip(ups, downs, strict=True)]
    u, s, v = _svd(_sparse(method, updates, weights, density, seed), rank)
    return s.sqrt()[:, None] * v, u * s.sqrt()


def _svd(update: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The largest `rank` singular values and their vectors: (out, rank), (rank,), (rank, in)."""
    u, s, v = torch.svd_lowrank(update, min(rank + 8, *update.shape), niter=4)
    return u[:, :rank], s[:rank], v.T[:rank]


def _sparse(method: str, tensors: list[torch.Tensor], weights: list[float], density: float, seed: int) -> torch.Tensor:
    from peft.utils import merge_utils

    torch.manual_seed(seed)
    made: torch.Tensor = getattr(merge_utils, method)(tensors, torch.tensor(weights), density)
    return made


def _padded(tensor: torch.Tensor, rank: int, down: bool) -> torch.Tensor:
    """Modules that fewer adapters have are padded with zeros to one rank."""
    missing = rank - tensor.shape[0 if down else 1]
    return nn.functional.pad(tensor, (0, 0, 0, missing) if down else (0, missing)).to(torch.float32)


def _write(out: Path, tensors: dict[str, torch.Tensor], like: Adapter, source: Path, modules: list[str]) -> int:
    """The adapter in `out`; its rank, the widest of the modules'."""
    rank = max(tensor.shape[0] for name, tensor in tensors.items() if ".lora_A." in name)
    tensors = {name: _padded(tensor, rank, ".lora_A." in name) for name, tensor in tensors.items()}
    out.mkdir(parents=True)
    kept = {name: value for name, value in like.config.items() if name not in NARROWER}
    config = {
        **kept, "r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {},
        "target_modules": sorted({module.rpartition(".")[2] for module in modules}),
    }  # fmt: skip
    (out / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    write_adapter(out, tensors)
    for file in source.glob("*token*"):
        shutil.copyfile(file, out / file.name)
    return rank
