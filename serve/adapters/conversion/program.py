"""The process that converts one adapter: PEFT says what it adds to each weight, and this finds the LoRA nearest to it.

It imports nothing of loradock. A job comes as JSON on its input, and what became of it goes to its output:

    {"folder", "into", "kind", "settings", "modules", "max_rank", "bound", "seconds", "memory"}
        >  {"facts"}      or {"problems"}      or {"too_large"}

The base's weights are not needed: PEFT gets a model of the same modules whose weights are one zero, repeated.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

PREFIX = "base_model.model."
# Up to this size of its smaller side a matrix is decomposed whole; a larger one by random projections.
WHOLE = 256
# Directions beyond those that are wanted, and rounds of sharpening: what Halko, Martinsson and Tropp (2011) advise.
BEYOND, ROUNDS = 16, 2
# Fields of PEFT's configurations that mean nothing here, or that reach out of this process.
LEFT_OUT = {
    *("auto_mapping", "peft_version", "task_type", "base_model_name_or_path", "revision"),
    *("inference_mode", "modules_to_save", "peft_type"),
}
SHOWN_PROBLEMS = 200


class Refused(Exception):
    """The adapter cannot be converted; the arguments say why, one for each thing that is wrong."""


@dataclasses.dataclass(slots=True)
class Part:
    """One module's matrix in the order of its directions; `left @ right` with all of them is nearest to the matrix."""

    name: str
    energy: float  # the sum of its squares
    squares: Any  # of the singular values, the largest first
    left: Any  # (out, directions)
    right: Any  # (directions, in)


def convert(job: dict[str, Any]) -> dict[str, Any]:
    """Write the LoRA into the folder `into`, and what it leaves out into `into/remainder`; the facts about it."""
    import torch
    from safetensors.torch import load_file

    tensors = load_file(Path(job["folder"]) / "adapter_model.safetensors")
    shapes = {name: (int(out), int(into)) for name, (out, into) in job["modules"].items()}
    layers = dict(_layers(job["kind"], job["settings"], shapes, tensors))
    dtype = torch.bfloat16 if all(t.dtype == torch.bfloat16 for t in tensors.values()) else torch.float32
    most, bound = job["max_rank"], job["bound"]
    parts = [_part(name, matrix, 2 * most + BEYOND) for name, matrix in _matrices(layers, shapes)]
    rank = _needed(parts, most, bound)
    if rank is None:
        raise Refused(_too_coarse(layers, shapes, parts, job))
    written = [_cut(part, 0, rank, dtype) for part in parts]
    facts = _measured(layers, shapes, written)
    into = Path(job["into"])
    _save(into, written, rank, job["settings"])
    if facts["error"] > 1e-4:
        width = min(most, max(part.squares.numel() for part in parts) - rank)
        if width > 0:
            _save(into / "remainder", [_cut(part, rank, rank + width, dtype) for part in parts], width, job["settings"])
    return {"rank": rank, **facts}


# What PEFT makes of it


def _layers(
    kind: str, settings: dict[str, Any], shapes: dict[str, tuple[int, int]], tensors: dict[str, Any]
) -> Iterator[tuple[str, Any]]:
    """PEFT's layers by the base's names, filled with the adapter's tensors."""
    from peft import PeftType, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.tuners.tuners_utils import BaseTunerLayer

    configuration = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)]
    fields = {field.name for field in dataclasses.fields(configuration)} - LEFT_OUT
    try:
        model = get_peft_model(
            _empty_model(shapes), configuration(**{name: settings[name] for name in settings if name in fields})
        )
        expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, AssertionError, ZeroDivisionError) as error:
        raise Refused(f"PEFT does not build it: {_line(error)}") from error
    if problems := list(_misfits(expected, tensors)):
        raise Refused(*problems)
    set_peft_model_state_dict(model, tensors)
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name.removeprefix(PREFIX), module


def _empty_model(shapes: dict[str, tuple[int, int]]) -> Any:
    """A tree of modules with these linear layers, which have no weights to speak of."""
    import torch

    root = torch.nn.Module()
    zero = torch.zeros(1)
    for name, (out, into) in shapes.items():
        parent = root
        *parents, last = name.split(".")
        for part in parents:
            if part not in parent._modules:
                parent.add_module(part, torch.nn.Module())
            parent = parent._modules[part]
        linear = torch.nn.Linear(into, out, bias=False, device="meta")
        linear.weight = torch.nn.Parameter(zero.expand(out, into), requires_grad=False)
        parent.add_module(last, linear)
    return root


def _misfits(expected: dict[str, Any], tensors: dict[str, Any]) -> Iterator[str]:
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in expected:
            yield f"`{_line(name)}` fits no module of the base, or none that target_modules names"
        elif name not in tensors:
            yield f"`{_line(name)}` is missing: target_modules names its module"
        elif expected[name].shape != tensors[name].shape:
            wanted, shape = list(expected[name].shape), list(tensors[name].shape)
            yield f"`{_line(name)}` is {shape}; the base and the configuration want {wanted}"


def _matrices(layers: dict[str, Any], shapes: dict[str, tuple[int, int]]) -> Iterator[tuple[str, Any]]:
    """What the adapter adds to each weight, one at a time."""
    import torch

    for name, layer in layers.items():
        with torch.no_grad():
            matrix = _matrix(layer)
        if tuple(matrix.shape) != shapes[name]:
            raise Refused(
                f"what it adds to `{_line(name)}` is {list(matrix.shape)}, and {list(shapes[name])} is wanted"
            )
        if not bool(torch.isfinite(matrix).all()):
            raise Refused(f"what it adds to `{_line(name)}` is not finite: its weights overflow")
        yield name, matrix


def _matrix(layer: Any) -> Any:
    from peft.tuners.lora.conversion import _convert_miss_module_to_lora
    from peft.tuners.miss.layer import MissLinear

    if isinstance(layer, MissLinear):  # it is a product already, and its own method wants the base's weight
        right, left, _ = _convert_miss_module_to_lora(layer, 1)
        return left.float() @ right.float()
    return layer.get_delta_weight("default").float()


# The nearest product of two thin matrices


def _part(name: str, matrix: Any, directions: int) -> Part:
    import torch

    wide = matrix.shape[0] > matrix.shape[1]
    short = matrix.T if wide else matrix
    side = short.shape[0]
    if side <= WHOLE:
        values, vectors = torch.linalg.eigh(short.double() @ short.double().T)
        basis = vectors.flip(1)[:, :directions].float()
        squares = values.flip(0).clamp(min=0)[:directions]
    else:
        basis = _projected(short, min(directions, side))
        inner = (basis.T @ short).double()
        values, vectors = torch.linalg.eigh(inner @ inner.T)
        basis = basis @ vectors.flip(1).float()
        squares = values.flip(0).clamp(min=0)
    left, right = basis, basis.T @ short
    # Each takes the root of a direction's size, so that both keep their digits in a short format.
    root = squares.float().pow(0.25)
    inverse = torch.where(root > 0, 1 / root, torch.zeros_like(root))
    left, right = left * root, right * inverse[:, None]
    if wide:
        left, right = right.T, left.T
    return Part(name, float(matrix.double().square().sum()), squares, left.contiguous(), right.contiguous())


def _projected(matrix: Any, directions: int) -> Any:
    """An orthonormal basis of nearly the largest directions; the same for the same matrix."""
    import torch

    draw = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(matrix @ torch.randn(matrix.shape[1], directions, generator=draw))
    for _ in range(ROUNDS):
        basis, _ = torch.linalg.qr(matrix @ (matrix.T @ basis))
    return basis


def _needed(parts: Sequence[Part], most: int, bound: float) -> int | None:
    """The smallest rank at which so much of all of them is kept, up to `most`."""
    whole = sum(part.energy for part in parts)
    for rank in range(1, most + 1):
        lost = sum(max(0.0, part.energy - float(part.squares[:rank].sum())) for part in parts)
        if lost <= bound**2 * whole:
            return rank
    return None


def _too_coarse(
    layers: dict[str, Any], shapes: dict[str, tuple[int, int]], parts: Sequence[Part], job: dict[str, Any]
) -> str:
    """What rank it would take, as far as that is found within half of the time."""
    most, bound = job["max_rank"], job["bound"]
    whole = sum(part.energy for part in parts)
    lost = sum(max(0.0, part.energy - float(part.squares[:most].sum())) for part in parts)
    side = max(min(shapes[name]) for name in layers)
    known, needed = most, None
    while needed is None and known < side and time.monotonic() - BEGAN < job["seconds"] / 2:
        known = min(4 * known, side)
        wider = [_part(name, matrix, known + BEYOND) for name, matrix in _matrices(layers, shapes)]
        needed = _needed(wider, known, bound)
    rank = str(needed) if needed is not None else f"more than {known}"
    return (
        f"a LoRA of rank {most}, the largest that this server takes, leaves out {math.sqrt(lost / whole):.3f} of it "
        f"(relative Frobenius norm), and {bound:g} is allowed: rank {rank} would be needed; raise max_lora_rank, "
        f"allow more with conversion_error, or merge it into its base with `loradock optimize`"
    )


def _cut(part: Part, begin: int, end: int, dtype: Any) -> tuple[str, Any, Any]:
    """These directions of a part as they are written: (name, lora_A, lora_B), with zeros where it has no more."""
    import torch

    right = torch.zeros(end - begin, part.right.shape[1], dtype=dtype)
    left = torch.zeros(part.left.shape[0], end - begin, dtype=dtype)
    there = max(0, min(end, part.right.shape[0]) - begin)
    right[:there] = part.right[begin : begin + there].to(dtype)
    left[:, :there] = part.left[:, begin : begin + there].to(dtype)
    return part.name, right, left


def _measured(
    layers: dict[str, Any], shapes: dict[str, tuple[int, int]], written: Sequence[tuple[str, Any, Any]]
) -> dict[str, Any]:
    """How far what is written is from what PEFT adds: of all modules, and of the worst one."""
    lost = whole = 0.0
    worst, worst_module = 0.0, ""
    for (name, right, left), (_, matrix) in zip(written, _matrices(layers, shapes), strict=True):
        off = float((matrix - left.float() @ right.float()).double().square().sum())
        energy = float(matrix.double().square().sum())
        lost, whole = lost + off, whole + energy
        if energy and (share := math.sqrt(off / energy)) > worst:
            worst, worst_module = share, name
    error = math.sqrt(lost / whole) if whole else 0.0
    return {"error": round(error, 5), "worst_error": round(worst, 5), "worst_module": worst_module}


def _save(folder: Path, written: Sequence[tuple[str, Any, Any]], rank: int, settings: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    folder.mkdir(mode=0o700, exist_ok=True)
    tensors = {}
    for name, right, left in written:
        tensors[f"{PREFIX}{name}.lora_A.weight"] = right
        tensors[f"{PREFIX}{name}.lora_B.weight"] = left
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    configuration = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name, _, _ in written}),
        "base_model_name_or_path": settings.get("base_model_name_or_path"),
    }
    (folder / "adapter_config.json").write_text(json.dumps(configuration, sort_keys=True))


def _line(text: object) -> str:
    """One line of it, fit to be shown."""
    line = " ".join(str(text).split())[:300]
    return "".join(letter if letter.isprintable() else "?" for letter in line)


def _bound_memory(nbytes: int) -> None:
    """What this process may take beyond what its imports have taken."""
    status = Path("/proc/self/status").read_text()
    used = next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (used + nbytes, used + nbytes))


def main() -> None:
    job = json.load(sys.stdin)
    os.nice(10)
    answers = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints is no answer
    try:
        import peft
        import torch

        assert peft.__version__
        # Sums in another order would give other bytes, and the same adapter pushed twice is one version.
        torch.set_num_threads(2)
        torch.use_deterministic_algorithms(True, warn_only=True)
        if sys.platform == "linux":
            _bound_memory(job["memory"])
        answer: dict[str, Any] = {"facts": convert(job)}
    except Refused as refusal:
        problems = list(refusal.args)
        more = len(problems) - SHOWN_PROBLEMS
        answer = {"problems": problems if more <= 0 else [*problems[:SHOWN_PROBLEMS], f"... and {more} more"]}
    except MemoryError:
        answer = {"too_large": True}
    except RuntimeError as error:
        if "allocate memory" not in str(error):
            raise
        answer = {"too_large": True}
    os.write(answers, json.dumps(answer).encode())


BEGAN = time.monotonic()

if __name__ == "__main__":
    main()
