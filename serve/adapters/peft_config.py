"""adapter_config.json of PEFT, read as untrusted bytes: its types, what cannot be served, and its patterns."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import regex

from serve.adapters import added_tokens
from serve.adapters.adapter import CONFIG, Limits
from serve.adapters.patterns import pattern_problem
from serve.adapters.saved_modules import served_problems, setting_problems
from serve.adapters.untrusted import open_plain, parse_json, rejected
from serve.errors import AdapterRejected
from serve.names import shown

RETRAIN = "train it again as a plain LoRA, without that"

# By PEFT's name of them, how people call the kinds that become LoRA at a push (serve.adapters.conversion). All of them
# add a matrix to a weight, which does not depend on that weight.
CONVERTED = {
    "LOHA": "LoHa",
    "LOKR": "LoKr",
    "VERA": "VeRA",
    "RANDLORA": "RandLoRA",
    "FOURIERFT": "FourierFT",
    "C3A": "C3A",
    "MISS": "MiSS",
}

_CONFIG_BYTES = 1 << 20
_PATTERN_CHARS = 4096
_PATTERN_SECONDS = 1.0

# Initializations that leave the base alone: the saved adapter is a plain LoRA. The others (PiSSA, OLoRA, CorDA,
# LoftQ) change the base's weights too, and their saved half means nothing over the original base, merged or not.
_PLAIN_INITS = {"gaussian", "eva", "orthogonal", "mica", "lora_ga"}
_CONVERTIBLE_INITS = ("pissa", "olora", "corda")


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """adapter_config.json, typed; `raw` is all of it."""

    rank: int
    base: str | None
    targets: tuple[str, ...] | str
    rank_pattern: dict[str, int]
    raw: dict[str, Any]


def read_config(path: Path) -> PeftConfig:
    """Parse adapter_config.json; every field that shapes the answer must have its type. Unknown ones are PEFT's."""
    raw = read_settings(path)
    problems = [*_number_problems(raw), *target_problems(raw), *_other_problems(raw), *setting_problems(raw)]
    problems += added_tokens.setting_problems(raw)
    if problems:
        raise rejected(problems, f"{CONFIG} cannot be read as a LoRA configuration")
    targets = raw.get("target_modules")
    return PeftConfig(
        rank=raw["r"],
        base=raw.get("base_model_name_or_path") or None,
        targets=tuple(targets) if isinstance(targets, list) else targets or (),
        rank_pattern=dict(raw.get("rank_pattern") or {}),
        raw=raw,
    )


def read_settings(path: Path) -> dict[str, Any]:
    """The fields of adapter_config.json, of whatever kind."""
    with open_plain(path) as file:
        data = file.read(_CONFIG_BYTES + 1)
    if len(data) > _CONFIG_BYTES:
        raise AdapterRejected(
            f"{CONFIG} is above {_CONFIG_BYTES} bytes, which no PEFT configuration is; send the real one"
        )
    raw = parse_json(data, CONFIG)
    if not isinstance(raw, dict):
        raise AdapterRejected(f"{CONFIG} is not a JSON object; send the file that PEFT's save_pretrained wrote")
    return raw


def _number_problems(raw: Mapping[str, Any]) -> Iterator[str]:
    if raw.get("peft_type") != "LORA":
        others = ", ".join(CONVERTED)
        yield f"peft_type is {shown(raw.get('peft_type'))}; this server takes LORA, and converts {others}"
    if not _whole(raw.get("r")):
        yield f"r is {shown(raw.get('r'))}; it must be a whole number above 0"
    if not _positive(raw.get("lora_alpha")):
        yield f"lora_alpha is {shown(raw.get('lora_alpha'))}; it must be a finite number above 0"
    yield from _pattern_problems("rank_pattern", raw.get("rank_pattern"), _whole, "whole numbers above 0")
    yield from _pattern_problems("alpha_pattern", raw.get("alpha_pattern"), _positive, "finite numbers above 0")


def target_problems(raw: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with its target_modules."""
    targets = raw.get("target_modules")
    if isinstance(targets, list) and targets and all(isinstance(target, str) and target for target in targets):
        return
    if isinstance(targets, str) and targets:
        if targets != "all-linear":
            yield from _regex_problems("target_modules", targets)
    elif not raw.get("target_parameters"):
        yield f"target_modules is {shown(targets)}; it must be a list of module names or a regular expression"


def _other_problems(raw: Mapping[str, Any]) -> Iterator[str]:
    base = raw.get("base_model_name_or_path")
    if base is not None and not (isinstance(base, str) and len(base) <= 1024 and base.isprintable()):
        yield "base_model_name_or_path is not a printable string"
    for key in ("use_rslora", "use_dora", "lora_bias", "use_qalora", "fan_in_fan_out"):
        if not isinstance(raw.get(key), bool | None):
            yield f"{key} is {shown(raw[key])}; it must be true or false"


def config_problems(config: PeftConfig, limits: Limits) -> Iterator[str]:
    """What is well written, and cannot be served beside other adapters."""
    raw = config.raw
    yield from served_problems(raw)
    if raw.get("bias", "none") != "none":
        yield f"it trains biases (bias: {shown(raw['bias'])}; only none is served); train it again with bias none"
    init = raw.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
        yield f"init_lora_weights is {shown(init)}, which also changes the base's weights; {_init_remedy(init)}"
    for key, what in (
        ("lora_bias", "has a bias in its LoRA layers"),
        ("layer_replication", "repeats layers of the base"),
        ("alora_invocation_tokens", "is an activated LoRA that begins at a token"),
        ("use_bdlora", "is block-diagonal"),
        ("use_qalora", "pools its input (QA-LoRA)"),
        ("target_parameters", "adapts bare parameters such as fused experts"),
        ("arrow_config", "routes between several adapters"),
        ("monteclora_config", "samples its weights"),
    ):
        if raw.get(key):
            yield f"it {what} ({key}), which the engine does not apply and `loradock optimize` cannot merge; {RETRAIN}"
    # The engine compares the default r too, even when rank_pattern overrides it everywhere.
    for rank in sorted({config.rank, *config.rank_pattern.values()}):
        if rank > limits.max_rank:
            yield (
                f"rank {rank} is above the {limits.max_rank} that this server takes; retrain, or raise max_lora_rank "
                "(and max_adapter_rank, where it is set)"
            )


def _init_remedy(init: str) -> str:
    if init.lower().startswith(_CONVERTIBLE_INITS):
        return "save it again with PEFT's path_initial_model_for_weight_conversion"
    return "train it again with init_lora_weights true"


def _pattern_problems(field: str, pattern: Any, good: Callable[[Any], bool], kind: str) -> Iterator[str]:
    if pattern is None:
        return
    if not isinstance(pattern, dict):
        yield f"{field} is {shown(pattern)}; it must map module names to {kind}"
        return
    for key, value in pattern.items():
        yield from _regex_problems(field, key)
        if not good(value):
            yield f"{field} gives {shown(value)} to `{shown(key)}`; it takes {kind}"


def _regex_problems(field: str, pattern: str) -> Iterator[str]:
    if len(pattern) > _PATTERN_CHARS:
        yield f"{field} holds a pattern of {len(pattern)} characters; {_PATTERN_CHARS} are enough for module names"
        return
    if problem := pattern_problem(pattern):
        yield f"{field} holds {problem}"


class Patterns:
    """Match module names as PEFT and the engine do, within a time that a hostile pattern cannot stretch.

    The engine runs the same patterns over the same names with no clock at all, so one that is slow here is refused.
    """

    def __init__(self) -> None:
        self.left = _PATTERN_SECONDS

    def match(self, field: str, pattern: str, text: str) -> bool:
        began = monotonic()
        try:
            return regex.match(pattern, text, timeout=max(self.left, 0.001)) is not None
        except (TimeoutError, RecursionError, MemoryError) as slow:
            raise AdapterRejected(
                f"a pattern in {field} takes too long to match module names: `{shown(pattern)}`; "
                "name the modules instead"
            ) from slow
        except (regex.error, OverflowError) as wrong:
            raise AdapterRejected(f"{field} holds a pattern that cannot be used: `{shown(pattern)}`") from wrong
        finally:
            self.left -= monotonic() - began


def rank_of(module: str, config: PeftConfig, patterns: Patterns) -> int:
    """The rank that the configuration gives a module."""
    for key, rank in config.rank_pattern.items():
        if patterns.match("rank_pattern", rf"(.*\.)?({key})$", module):
            return rank
    return config.rank


def scaling_of(module: str, config: PeftConfig, patterns: Patterns) -> float:
    """What the product of a module's two tensors is multiplied with."""
    alpha = config.raw["lora_alpha"]
    for key, value in (config.raw.get("alpha_pattern") or {}).items():
        if patterns.match("alpha_pattern", rf"(.*\.)?({key})$", module):
            alpha = value
            break
    rank = rank_of(module, config, patterns)
    return float(alpha / (math.sqrt(rank) if config.raw.get("use_rslora") else rank))


def _whole(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 31


def _positive(value: Any) -> bool:
    # A JSON integer may be too large for a float.
    return type(value) in (int, float) and 0 < value < 1e30
