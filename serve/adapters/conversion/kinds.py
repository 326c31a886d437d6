"""The PEFT methods that become LoRA at a push, and what their files must be before PEFT reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from serve.adapters.adapter import CONFIG, WEIGHTS, Limits
from serve.adapters.module_names import Modules, as_in_file
from serve.adapters.peft_config import CONVERTED, Patterns, read_settings, target_problems
from serve.adapters.saved_modules import MERGE
from serve.adapters.tensors import FLOATS, read_header, scan
from serve.adapters.untrusted import open_plain, rejected
from serve.errors import AdapterRejected
from serve.names import shown

# Whose weight lies the other way round, so that none of these methods takes them.
_TABLES = ("embed_tokens", "wte", "word_embeddings")


def convertible(folder: Path) -> dict[str, Any] | None:
    """The configuration of an adapter that is to be converted; None for a LoRA, and for what is no adapter at all."""
    try:
        settings = read_settings(folder / CONFIG)
    except AdapterRejected:
        return None  # its inspection says what is wrong
    kind = settings.get("peft_type")
    return settings if isinstance(kind, str) and kind in CONVERTED else None


def check(folder: Path, settings: Mapping[str, Any], modules: Modules, limits: Limits) -> Modules:
    """The base's modules as the adapter calls them. AdapterRejected, unless its types are sound and its values finite;
    the shapes are PEFT's to judge.
    """
    kind = CONVERTED[settings["peft_type"]]
    problems = [*target_problems(settings), *_setting_problems(settings)]
    with open_plain(folder / WEIGHTS) as file:
        tensors = read_header(file)
        modules = as_in_file(modules, (tensor.name for tensor in tensors))
        if len(tensors) > limits.max_tensors:
            problems.append(f"{len(tensors)} tensors are more than the {limits.max_tensors} that this server takes")
        problems += [
            f"`{shown(tensor.name)}` is {tensor.dtype}; save the adapter as BF16, F16 or F32"
            for tensor in tensors
            if tensor.dtype not in FLOATS
        ]
        if not problems:
            problems = [
                f"`{shown(tensor.name)}` holds NaN or infinity" for tensor in tensors if not scan(file, tensor)[0]
            ]
    targets = settings.get("target_modules")
    if isinstance(targets, str) and targets != "all-linear" and not problems:
        # PEFT runs the pattern with no clock at all.
        patterns = Patterns()
        if not any([patterns.match("target_modules", f"(?:{targets})\\Z", module) for module in modules]):
            problems.append(f"target_modules `{shown(targets)}` matches no module of the base")
    if problems:
        raise rejected(problems, f"this {kind} adapter cannot be converted to LoRA")
    return modules


def linears(settings: Mapping[str, Any], modules: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """What PEFT may find of the base: no embeddings; no output layer either where all linear ones are meant."""
    left_out = (*_TABLES, "lm_head") if settings.get("target_modules") == "all-linear" else _TABLES
    return {name: shape for name, shape in modules.items() if name.rpartition(".")[2] not in left_out}


def _setting_problems(settings: Mapping[str, Any]) -> Iterator[str]:
    if settings.get("modules_to_save"):
        yield f"it replaces whole modules (modules_to_save: {shown(settings['modules_to_save'])}); {MERGE}"
    if settings.get("bias", "none") != "none":
        yield f"it trains biases (bias: {shown(settings['bias'])}; only none is served); train it again with bias none"
    if settings["peft_type"] == "MISS" and settings.get("init_weights") == "bat":
        yield f"a MiSS adapter with init_weights bat depends on the base's weights; {MERGE}"
