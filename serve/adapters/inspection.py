"""`inspect` says whether the base model can run an adapter.

It reads a PEFT folder as untrusted bytes. It answers with an Inspection, or with one AdapterRejected that names
everything that does not fit, so that whoever trained the adapter has to come back once and not eleven times. What the
engine would refuse at load is refused here, and so is what it would accept and then ignore.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from serve.adapters.adapter import CARD, CONFIG, WEIGHTS, Inspection, Limits
from serve.adapters.added_tokens import added_tokens
from serve.adapters.module_names import PREFIX, as_in_file
from serve.adapters.peft_config import (
    RETRAIN,
    Patterns,
    PeftConfig,
    config_problems,
    rank_of,
    read_config,
    scaling_of,
)
from serve.adapters.provenance import front_matter, read_license, read_provenance
from serve.adapters.saved_modules import EMBEDDINGS, MERGE, OUTPUT, Saved, head_of, saved_module, saved_problems
from serve.adapters.tensors import FLOATS, Tensor, read_header, scan
from serve.adapters.untrusted import open_plain, rejected
from serve.names import shown

_HALVES = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "A",
    ".lora_embedding_B": "B",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}
_TABLES = (*EMBEDDINGS, OUTPUT)
# PEFT saves the base's own embedding beside its LoRA; the engine passes over these two names.
_BASE_COPIES = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")


def inspect(folder: Path, modules: Mapping[str, tuple[int, int]], limits: Limits) -> Inspection:
    """Judge the PEFT folder against the base's `modules`, name -> (out_features, in_features).

    An embedding counts as (embedding_dim, vocabulary), which is how its LoRA multiplies.
    """
    config = read_config(folder / CONFIG)
    license = read_license(front_matter(folder / CARD))
    with open_plain(folder / WEIGHTS) as file:
        tensors = read_header(file)
        problems = [*config_problems(config, limits), *_license_problems(license, limits)]
        _raise(problems, config)  # a rank that is no number, or a DoRA, makes everything below it wrong too

        modules = as_in_file(modules, (tensor.name for tensor in tensors))
        pairs: dict[str, dict[str, Tensor]] = {}
        saved: Saved = {}
        problems += _match(tensors, modules, pairs, saved)
        problems += _shape_problems(pairs, modules, config)
        problems += saved_problems(saved, config.raw, modules, pairs)
        problems += _target_problems(pairs, modules, config, limits)
        if len(tensors) > limits.max_tensors:
            problems.append(f"{len(tensors)} tensors are more than the {limits.max_tensors} that this server takes")
        if not pairs:
            problems.append(f"{WEIGHTS} has no LoRA tensor for any module of the base, so it would change nothing")
        _raise(problems, config)
        _raise(list(_value_problems(file, pairs, saved, limits)), config)
        nbytes = (folder / CONFIG).stat().st_size + os.fstat(file.fileno()).st_size

    return Inspection(
        rank=max(pair["A"].shape[0] for pair in pairs.values()),
        base=config.base,
        target_modules=tuple(sorted({module.rpartition(".")[2] for module in pairs})),
        nbytes=nbytes,
        tensors=len(tensors),
        license=license,
        provenance=read_provenance(folder, config.raw),
        saved_modules=tuple(sorted({module for module, _ in saved})),
        added_tokens=tuple(token.content for token in added_tokens(config.raw)),
        labels=head.labels if (head := head_of(saved.values(), config.raw)) else (),
    )


# The card


def _license_problems(license: str | None, limits: Limits) -> Iterator[str]:
    if limits.allowed_licenses is None or license in limits.allowed_licenses:
        return
    allowed = ", ".join(sorted(limits.allowed_licenses))
    if license is None:
        yield f"its {CARD} states no license; this server takes {allowed}: send the {CARD} with `license:` at its top"
    else:
        yield f"its license is {license}; this server takes {allowed}"


# The tensors


def _match(
    tensors: Iterable[Tensor],
    modules: Mapping[str, tuple[int, int]],
    pairs: dict[str, dict[str, Tensor]],
    saved: Saved,
) -> Iterator[str]:
    """Fill `pairs`, module -> its A and B, and its magnitude; and `saved`."""
    for tensor in tensors:
        name = tensor.name
        if name.endswith(_BASE_COPIES):
            yield from _base_copy_problems(tensor, modules)
            continue
        ending = next((ending for ending in _HALVES if name.endswith(ending)), None)
        if ending is None and (place := saved_module(name)):
            if place in saved:
                yield f"`{shown(name)}` is the second one for its module"
            saved[place] = tensor
            continue
        if ending is None:
            yield f"`{shown(name)}` is not a LoRA tensor (lora_A or lora_B); {MERGE}"
            continue
        module = name.removeprefix(PREFIX).removesuffix(ending)
        if module not in modules:
            yield f"`{shown(name)}` fits no module of the base"
            continue
        if tensor.dtype not in FLOATS:
            yield f"`{shown(name)}` is {tensor.dtype}; save the adapter as BF16, F16 or F32"
        half = _HALVES[ending]
        if half in pairs.setdefault(module, {}):
            yield f"`{shown(name)}` is the second lora_{half} for one module"
            continue
        pairs[module][half] = tensor


def _base_copy_problems(tensor: Tensor, modules: Mapping[str, tuple[int, int]]) -> Iterator[str]:
    module = tensor.name.removeprefix(PREFIX).removesuffix(".base_layer.weight")
    if module not in modules:
        yield f"`{shown(tensor.name)}` fits no module of the base"
    elif tensor.shape not in (modules[module], modules[module][::-1]):
        yield f"`{shown(tensor.name)}` is {list(tensor.shape)}: it was trained on another vocabulary than this base's"


def _shape_problems(
    pairs: Mapping[str, Mapping[str, Tensor]],
    modules: Mapping[str, tuple[int, int]],
    config: PeftConfig,
) -> Iterator[str]:
    patterns = Patterns()
    for module, pair in pairs.items():
        out, into = modules[module]
        rank = rank_of(module, config, patterns)
        scaling_of(module, config, patterns)  # the engine matches the same patterns
        for half, wanted in (("A", (rank, into)), ("B", (out, rank))):
            if half not in pair:
                other = "B" if half == "A" else "A"
                yield f"`{module}` has lora_{other} and no lora_{half}"
            elif pair[half].shape != wanted:
                shape = list(pair[half].shape)
                yield f"`{shown(pair[half].name)}` is {shape}; the base and rank {rank} want {list(wanted)}"
        yield from _magnitude_problems(module, pair, out, config)


def _magnitude_problems(module: str, pair: Mapping[str, Tensor], out: int, config: PeftConfig) -> Iterator[str]:
    """DoRA's: one number for each output of every module that it adapts."""
    magnitude = pair.get("magnitude")
    if not config.raw.get("use_dora"):
        if magnitude:
            yield f"`{shown(magnitude.name)}` is a magnitude, and use_dora is not set; {RETRAIN}"
        return
    if magnitude is None:
        yield f"`{module}` has no lora_magnitude_vector, and use_dora is set; save the adapter again"
    elif magnitude.shape != (out,):
        yield f"`{shown(magnitude.name)}` is {list(magnitude.shape)}; the base wants {[out]}"
    if module.rpartition(".")[2] in _TABLES:
        yield f"it uses DoRA on `{module}`, which the engine applies to linear layers alone; {MERGE}"


def _target_problems(
    pairs: Mapping[str, Any], modules: Mapping[str, tuple[int, int]], config: PeftConfig, limits: Limits
) -> Iterator[str]:
    targets = config.targets
    if isinstance(targets, tuple):
        present, known = _suffixes(pairs), _suffixes(modules)
        for target in sorted(set(targets)):
            if target in present or (target in known and config.raw.get("exclude_modules")):
                continue
            where = "no tensor of the file" if target in known else "no module of the base"
            yield f"target_modules names `{shown(target)}`, and that matches {where}"
    elif targets != "all-linear":
        patterns = Patterns()
        strays = [module for module in pairs if not patterns.match("target_modules", f"(?:{targets})\\Z", module)]
        if len(strays) == len(pairs) and pairs:
            yield f"target_modules `{shown(targets)}` matches no module that the file has tensors for"
    if limits.allowed_target_modules is not None:
        for name in sorted({module.rpartition(".")[2] for module in pairs} - limits.allowed_target_modules):
            allowed = ", ".join(sorted(limits.allowed_target_modules))
            yield f"it adapts `{name}`; this server allows {allowed}"


def _suffixes(modules: Iterable[str]) -> set[str]:
    """Every way to name a module from the right: a.b.c, b.c, c."""
    return {module.split(".", cut)[-1] for module in modules for cut in range(module.count(".") + 1)}


def _value_problems(
    file: BinaryIO, pairs: Mapping[str, Mapping[str, Tensor]], saved: Saved, limits: Limits
) -> Iterator[str]:
    """NaN, infinity, and an adapter whose every product is zero."""
    effect = bool(saved)
    for tensor in saved.values():
        if not scan(file, tensor)[0]:
            yield f"`{shown(tensor.name)}` holds NaN or infinity"
    for pair in pairs.values():
        zeros = set()
        for half, tensor in pair.items():
            finite, zero = scan(file, tensor)
            if not finite:
                yield f"`{shown(tensor.name)}` holds NaN or infinity"
            zeros |= {half} if zero else set()
            if half == "magnitude" and zero:
                yield f"`{shown(tensor.name)}` is zero throughout, which silences its module; save the adapter again"
        # A magnitude scales the base's own outputs.
        effect = effect or "magnitude" in pair or not zeros
    if not effect and not limits.may_change_nothing:
        yield "every lora_B (or its lora_A) is zero, so the adapter would change nothing: was it saved before training?"


def _raise(problems: list[str], config: PeftConfig) -> None:
    if problems:
        trained = f" (it says it was trained on {shown(config.base)})" if config.base else ""
        raise rejected(problems, f"this adapter does not fit the base model{trained}")
