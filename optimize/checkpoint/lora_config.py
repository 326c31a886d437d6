"""What an adapter_config.json says of a LoRA, and why some are no sum of a base and a product of two matrices."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from optimize.checkpoint.checkpoint import Entry

# These leave the base alone. PiSSA, OLoRA, CorDA and LoftQ change its weights too: their saved half means nothing over
# the original.
PLAIN_INITS = {"gaussian", "eva", "orthogonal", "mica", "lora_ga"}
CONVERTIBLE_INITS = ("pissa", "olora", "corda")
MORE_THAN_LORA = {
    "layer_replication": "repeats layers of the base",
    "alora_invocation_tokens": "begins at a token (activated LoRA)",
    "use_bdlora": "is block-diagonal",
    "use_qalora": "pools its input (QA-LoRA)",
    "target_parameters": "adapts bare parameters such as fused experts",
    "arrow_config": "routes between several adapters",
    "monteclora_config": "samples its weights",
}


def problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Why it cannot be computed as base + scaled product."""
    if not _whole(config.get("r")):
        yield f"its rank r is {config.get('r')!r}, and not a whole number above 0"
    if not _number(config.get("lora_alpha")):
        yield f"its lora_alpha is {config.get('lora_alpha')!r}, and not a finite number above 0"
    for field, fits, kind in (
        ("rank_pattern", _whole, "whole numbers above 0"),
        ("alpha_pattern", _number, "finite numbers above 0"),
    ):
        yield from _pattern_problems(field, config.get(field) or {}, fits, kind)
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in PLAIN_INITS:
        convertible = init.lower().startswith(CONVERTIBLE_INITS)
        remedy = (
            "save it again with PEFT's path_initial_model_for_weight_conversion"
            if convertible
            else "train it again with init_lora_weights true"
        )
        yield f"it began as {init} (init_lora_weights), which changes the base's weights too: {remedy}"
    for field, what in MORE_THAN_LORA.items():
        if config.get(field):
            yield f"it {what} ({field}): train it again as a plain LoRA"


def tensor_problems(config: Mapping[str, Any], entries: Mapping[str, Entry]) -> Iterator[str]:
    """Where its tensors are not the pairs, of the ranks, that the config promises."""
    parts: dict[str, dict[str, Entry]] = {}
    for name, entry in entries.items():
        module, separator, part = name.removeprefix("base_model.model.").partition(".lora_")
        if separator:
            parts.setdefault(module, {})[part.removesuffix(".weight").removesuffix(".default")] = entry
    if not entries:
        yield "its file of weights holds none"
    for module, having in parts.items():
        down, up = ("embedding_A", "embedding_B") if "embedding_A" in having else ("A", "B")
        if missing := {down, up} - set(having):
            yield f"{module} has no lora_{sorted(missing)[0]} beside its other half"
            continue
        rank = rank_of(config, module)
        if having[down].shape[0] != rank:
            yield f"lora_{down} of {module} has rank {having[down].shape[0]}, and {rank} by its config"


def rank_of(config: Mapping[str, Any], module: str) -> int:
    return int(_by_pattern(config.get("rank_pattern"), module, config["r"]))


def scale(config: Mapping[str, Any], module: str) -> float:
    """What the product of a module's two matrices is multiplied with."""
    alpha, rank = _by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"]), rank_of(config, module)
    return float(alpha / (rank**0.5 if config.get("use_rslora") else rank))


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rank_pattern and alpha_pattern: the first key that the module's name ends with."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _pattern_problems(field: str, patterns: Any, fits: Any, kind: str) -> Iterator[str]:
    if not isinstance(patterns, dict) or not all(map(fits, patterns.values())):
        yield f"its {field} does not give {kind}: {patterns!r}"
        return
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            yield f"its {field} has {pattern!r}, which is no regular expression ({error})"


def _whole(value: Any) -> bool:
    return type(value) is int and value > 0


def _number(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf
