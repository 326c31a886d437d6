"""An adapter: the value that flows through the house, and `inspect`, which says whether the base model can run it.

`inspect` reads a PEFT folder as untrusted bytes. It answers with an Inspection, or with one AdapterRejected that names
everything that does not fit, so that whoever trained the adapter has to come back once and not eleven times. What the
engine would refuse at load is refused here, and so is what it would accept and then ignore.

The safetensors format: https://huggingface.co/docs/safetensors (8 bytes little-endian header length, JSON, raw data).
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any, BinaryIO, NoReturn

import regex

from serve.errors import AdapterRejected
from serve.names import shown, tenant_of

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
FILES = (CONFIG, WEIGHTS)
CARD = "README.md"

MERGE = "merge it into its base with `loradock optimize` and serve the result"

_CONFIG_BYTES = 1 << 20
CARD_BYTES = 64 << 10
_HEADER_BYTES = 16 << 20
_SHOWN_PROBLEMS = 200
_PATTERN_CHARS = 4096
_PATTERN_SECONDS = 1.0

# The exponent bits (all set: NaN or infinity), by safetensors dtype. The sign is the top bit of each.
_FLOATS = {"F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80), "F32": ("<u4", 0x7F800000), "F64": ("<u8", 0x7FF << 52)}
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip

# Initializations that leave the base alone: the saved adapter is a plain LoRA. The others (PiSSA, OLoRA, CorDA,
# LoftQ) change the base's weights too, and their saved half means nothing over the original base.
_PLAIN_INITS = {"gaussian", "eva", "orthogonal", "mica", "lora_ga"}

_HALVES = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "A",
    ".lora_embedding_B": "B",
}
# PEFT saves the base's own embedding beside its LoRA; the engine passes over these two names.
_BASE_COPIES = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")


@dataclass(frozen=True, slots=True)
class Adapter:
    """One immutable version of an adapter; `name` is its full name, with the tenant in it (see serve.names)."""

    name: str
    version: int
    digest: str
    rank: int
    base: str | None
    target_modules: tuple[str, ...]
    nbytes: int
    created: float
    checks: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def id(self) -> str:
        """What the engine calls it; never reused for other bytes."""
        return f"{self.name}@{self.digest[:12]}"

    @property
    def tag(self) -> str:
        """What people call it."""
        return f"{self.name}@v{self.version}"

    @property
    def tenant(self) -> str:
        """Whose it is."""
        return tenant_of(self.name)


@dataclass(frozen=True, slots=True)
class Limits:
    """What this deployment takes; a None does not ask. Licences are Hugging Face's identifiers, in lower case."""

    max_rank: int
    allowed_licenses: frozenset[str] | None = None
    allowed_target_modules: frozenset[str] | None = None
    allowed_digests: frozenset[str] | None = None
    max_tensors: int = 200_000


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a sound adapter turned out to be."""

    rank: int
    base: str | None
    target_modules: tuple[str, ...]
    nbytes: int
    tensors: int
    license: str | None = None


def check_digest(digest: str, limits: Limits) -> str:
    """The digest, if this deployment takes these bytes."""
    if limits.allowed_digests is None or digest in limits.allowed_digests:
        return digest
    raise AdapterRejected(
        f"{digest} is not among the digests that this server takes; have it approved, then push again"
    )


def inspect(folder: Path, modules: Mapping[str, tuple[int, int]], limits: Limits) -> Inspection:
    """Judge the PEFT folder against the base's `modules`, name -> (out_features, in_features).

    An embedding counts as (embedding_dim, vocabulary), which is how its LoRA multiplies.
    """
    config = read_config(folder / CONFIG)
    license = read_license(folder / CARD)
    with open_plain(folder / WEIGHTS) as file:
        tensors = read_header(file)
        problems = [*_config_problems(config, limits), *_license_problems(license, limits)]
        _raise(problems, config)  # a rank that is no number, or a DoRA, makes everything below it wrong too

        pairs: dict[str, dict[str, Tensor]] = {}
        problems += _match(tensors, modules, pairs)
        problems += _shape_problems(pairs, modules, config, limits)
        problems += _target_problems(pairs, modules, config, limits)
        if len(tensors) > limits.max_tensors:
            problems.append(f"{len(tensors)} tensors are more than the {limits.max_tensors} that this server takes")
        if not pairs:
            problems.append(f"{WEIGHTS} has no LoRA tensor for any module of the base, so it would change nothing")
        _raise(problems, config)
        _raise(list(_value_problems(file, pairs)), config)
        nbytes = (folder / CONFIG).stat().st_size + os.fstat(file.fileno()).st_size

    return Inspection(
        rank=max(pair["A"].shape[0] for pair in pairs.values()),
        base=config.base,
        target_modules=tuple(sorted({module.rpartition(".")[2] for module in pairs})),
        nbytes=nbytes,
        tensors=len(tensors),
        license=license,
    )


# The card


def read_license(card: Path) -> str | None:
    """`license:` in the front matter of a README.md, if there is one: Hugging Face's identifier, in lower case."""
    if not card.exists():
        return None
    with open_plain(card) as file:
        text = file.read(CARD_BYTES).decode("utf-8", "replace")
    front = re.match(r"\ufeff?---[ \t]*\r?\n(.*?)\r?\n---", text, re.S)
    if front is None:
        return None
    # Searched as text: a YAML document can be built to eat the memory.
    found = re.search(r"^license:[ \t]*([\"']?)([A-Za-z0-9._+-]{1,64})\1[ \t]*(#.*)?\r?$", front[1], re.M)
    return found[2].lower() if found else None


def _license_problems(license: str | None, limits: Limits) -> Iterator[str]:
    if limits.allowed_licenses is None or license in limits.allowed_licenses:
        return
    allowed = ", ".join(sorted(limits.allowed_licenses))
    if license is None:
        yield f"its {CARD} states no license; this server takes {allowed}: send the {CARD} with `license:` at its top"
    else:
        yield f"its license is {license}; this server takes {allowed}"


# The configuration


@dataclass(frozen=True, slots=True)
class Config:
    """adapter_config.json, typed; `raw` is all of it."""

    rank: int
    base: str | None
    targets: tuple[str, ...] | str
    rank_pattern: dict[str, int]
    raw: dict[str, Any]


def read_config(path: Path) -> Config:
    """Parse adapter_config.json; every field that shapes the answer must have its type. Unknown ones are PEFT's."""
    with open_plain(path) as file:
        data = file.read(_CONFIG_BYTES + 1)
    if len(data) > _CONFIG_BYTES:
        raise AdapterRejected(
            f"{CONFIG} is above {_CONFIG_BYTES} bytes, which no PEFT configuration is; send the real one"
        )
    raw = _json(data, CONFIG)
    if not isinstance(raw, dict):
        raise AdapterRejected(f"{CONFIG} is not a JSON object; send the file that PEFT's save_pretrained wrote")

    problems: list[str] = []
    if raw.get("peft_type") != "LORA":
        problems.append(f"peft_type is {shown(raw.get('peft_type'))}; this server takes LORA")
    rank: Any = raw.get("r")
    if not _whole(rank):
        problems.append(f"r is {shown(rank)}; it must be a whole number above 0")
    alpha = raw.get("lora_alpha")
    if not _positive(alpha):
        problems.append(f"lora_alpha is {shown(alpha)}; it must be a finite number above 0")
    for key, good, kind in (
        ("rank_pattern", _whole, "whole numbers above 0"),
        ("alpha_pattern", _positive, "finite numbers above 0"),
    ):
        problems += _pattern_problems(key, raw.get(key), good, kind)
    targets: Any = raw.get("target_modules")
    if isinstance(targets, list) and targets and all(isinstance(target, str) and target for target in targets):
        targets = tuple(targets)
    elif isinstance(targets, str) and targets:
        if targets != "all-linear":
            problems += _regex_problems("target_modules", targets)
    elif not raw.get("target_parameters"):
        problems.append(
            f"target_modules is {shown(targets)}; it must be a list of module names or a regular expression"
        )
    base = raw.get("base_model_name_or_path")
    if base is not None and not (isinstance(base, str) and len(base) <= 1024 and base.isprintable()):
        problems.append("base_model_name_or_path is not a printable string")
        base = None
    for key in ("use_rslora", "use_dora", "lora_bias", "use_qalora", "fan_in_fan_out"):
        if not isinstance(raw.get(key), bool | None):
            problems.append(f"{key} is {shown(raw[key])}; it must be true or false")
    if problems:
        raise AdapterRejected(
            _sentence(problems, f"{CONFIG} cannot be read as a LoRA configuration"), problems=problems
        )
    return Config(rank, base or None, targets, dict(raw.get("rank_pattern") or {}), raw)


def _config_problems(config: Config, limits: Limits) -> Iterator[str]:
    """What is well written, and cannot be served beside other adapters."""
    raw = config.raw
    if raw.get("use_dora"):
        yield f"it uses DoRA (use_dora), which the engine does not apply; {MERGE}"
    if raw.get("modules_to_save"):
        yield f"it replaces whole modules (modules_to_save: {shown(raw['modules_to_save'])}); {MERGE}"
    if raw.get("bias", "none") != "none":
        yield f"it trains biases (bias: {shown(raw['bias'])}; only none is served); {MERGE}"
    if raw.get("lora_bias"):
        yield f"its LoRA layers have a bias (lora_bias), which the engine does not apply; {MERGE}"
    init = raw.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
        yield (
            f"init_lora_weights is {shown(init)}, which also changes the base's weights; save it again with PEFT's "
            f"path_initial_model_for_weight_conversion, or {MERGE}"
        )
    for key, what in (
        ("trainable_token_indices", "trains single tokens"),
        ("layer_replication", "repeats layers of the base"),
        ("alora_invocation_tokens", "is an activated LoRA that begins at a token"),
        ("use_bdlora", "is block-diagonal"),
        ("use_qalora", "pools its input (QA-LoRA)"),
        ("target_parameters", "adapts bare parameters such as fused experts"),
        ("arrow_config", "routes between several adapters"),
        ("monteclora_config", "samples its weights"),
    ):
        if raw.get(key):
            yield f"it {what} ({key}), which cannot be served beside other adapters; {MERGE}"
    # The engine compares the default r too, even when rank_pattern overrides it everywhere.
    for rank in sorted({config.rank, *config.rank_pattern.values()}):
        if rank > limits.max_rank:
            yield (
                f"rank {rank} is above the {limits.max_rank} that this server takes; retrain, or raise max_lora_rank "
                "(and max_adapter_rank, where it is set)"
            )


def _pattern_problems(field: str, pattern: Any, good: Any, kind: str) -> Iterator[str]:
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
    # Counted repeats are compiled by unrolling: three nested ones of 999 ask for the whole memory.
    counts = re.findall(r"\d+", "".join(re.findall(r"\{[^}]*\}", pattern)))
    if any(len(count) > 4 for count in counts) or math.prod(max(int(count), 1) for count in counts) > 10_000:
        yield f"{field} holds a pattern with too many counted repeats: `{shown(pattern)}`"
        return
    try:
        regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError, MemoryError, ValueError, TypeError, IndexError) as wrong:
        yield f"{field} holds `{shown(pattern)}`, which is no regular expression: {shown(wrong)}"


class _Patterns:
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


# The tensors


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor as the header describes it; `start` and `end` are offsets in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(file: BinaryIO) -> list[Tensor]:
    """The tensors of a safetensors file, in the order of their bytes, which must fill it without gap or overlap."""
    file.seek(0)
    head = file.read(9)
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(head[:8], "little")
    if len(head) < 9 or head[8:] != b"{" or length > size - 8:
        _not_safetensors(file)
    if length > _HEADER_BYTES:
        raise AdapterRejected(f"the header of {WEIGHTS} is {length} bytes; this server reads up to {_HEADER_BYTES}")
    file.seek(8)
    header = _json(file.read(length), f"the header of {WEIGHTS}")
    if not isinstance(header, dict):
        raise AdapterRejected(f"the header of {WEIGHTS} is not a JSON object; save the adapter again")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise AdapterRejected(f"the __metadata__ of {WEIGHTS} may only map strings to strings; save the adapter again")

    tensors = sorted(
        (_tensor(name, entry, 8 + length) for name, entry in header.items()),
        key=lambda tensor: (tensor.start, tensor.end),
    )
    at = 8 + length
    for tensor in tensors:
        if tensor.start != at:
            raise AdapterRejected(
                f"`{shown(tensor.name)}` begins at byte {tensor.start} of {WEIGHTS} and not at {at}; save it again"
            )
        at = tensor.end
    if at != size:
        short = "it was cut short" if at > size else "there are bytes that belong to no tensor"
        raise AdapterRejected(f"{WEIGHTS} should end at byte {at} and is {size} long: {short}; send it again")
    return tensors


def _tensor(name: str, entry: Any, base: int) -> Tensor:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(start), int(end)]} if (
            len(entry) == 3
            and len(shape) <= 8
            and all(type(size) is int and 0 <= size < 1 << 48 for size in shape)
            and type(start) is int
            and type(end) is int
            and 0 <= start <= end
        ):
            if dtype not in _BITS:
                raise AdapterRejected(
                    f"`{shown(name)}` has the unknown type {shown(dtype)}; save the adapter as BF16, F16 or F32"
                )
            if math.prod(shape) * _BITS[dtype] != 8 * (end - start):
                raise AdapterRejected(
                    f"`{shown(name)}` says {dtype} {shape} and holds {end - start} bytes; save the adapter again"
                )
            return Tensor(name, dtype, tuple(shape), base + start, base + end)
    raise AdapterRejected(
        f"the header of {WEIGHTS} describes `{shown(name)}` wrongly: {shown(entry)}; save the adapter again"
    )


def _match(
    tensors: Iterable[Tensor], modules: Mapping[str, tuple[int, int]], pairs: dict[str, dict[str, Tensor]]
) -> Iterator[str]:
    """Fill `pairs`, module -> its A and B."""
    for tensor in tensors:
        name = tensor.name
        if name.endswith(_BASE_COPIES):
            yield from _base_copy_problems(tensor, modules)
            continue
        ending = next((ending for ending in _HALVES if name.endswith(ending)), None)
        if ending is None:
            yield f"`{shown(name)}` is not a LoRA tensor (lora_A or lora_B); {MERGE}"
            continue
        module = name.removeprefix("base_model.model.").removesuffix(ending)
        if module not in modules:
            yield f"`{shown(name)}` fits no module of the base"
            continue
        if tensor.dtype not in _FLOATS:
            yield f"`{shown(name)}` is {tensor.dtype}; save the adapter as BF16, F16 or F32"
        half = _HALVES[ending]
        if half in pairs.setdefault(module, {}):
            yield f"`{shown(name)}` is the second lora_{half} for one module"
            continue
        pairs[module][half] = tensor


def _base_copy_problems(tensor: Tensor, modules: Mapping[str, tuple[int, int]]) -> Iterator[str]:
    module = tensor.name.removeprefix("base_model.model.").removesuffix(".base_layer.weight")
    if module not in modules:
        yield f"`{shown(tensor.name)}` fits no module of the base"
    elif tensor.shape not in (modules[module], modules[module][::-1]):
        yield f"`{shown(tensor.name)}` is {list(tensor.shape)}: it was trained on another vocabulary than this base's"


def _shape_problems(
    pairs: Mapping[str, Mapping[str, Tensor]], modules: Mapping[str, tuple[int, int]], config: Config, limits: Limits
) -> Iterator[str]:
    patterns = _Patterns()
    for module, pair in pairs.items():
        out, into = modules[module]
        rank = _rank_of(module, config, patterns)
        for key in config.raw.get("alpha_pattern") or {}:
            patterns.match("alpha_pattern", rf"(.*\.)?({key})$", module)
        for half, wanted in (("A", (rank, into)), ("B", (out, rank))):
            if half not in pair:
                other = "B" if half == "A" else "A"
                yield f"`{module}` has lora_{other} and no lora_{half}"
            elif pair[half].shape != wanted:
                shape = list(pair[half].shape)
                yield f"`{shown(pair[half].name)}` is {shape}; the base and rank {rank} want {list(wanted)}"


def _rank_of(module: str, config: Config, patterns: _Patterns) -> int:
    for key, rank in config.rank_pattern.items():
        if patterns.match("rank_pattern", rf"(.*\.)?({key})$", module):
            return rank
    return config.rank


def _target_problems(
    pairs: Mapping[str, Any], modules: Mapping[str, tuple[int, int]], config: Config, limits: Limits
) -> Iterator[str]:
    targets = config.targets
    if isinstance(targets, tuple):
        found, known = _suffixes(pairs), _suffixes(modules)
        for target in sorted(set(targets)):
            if target in found or (target in known and config.raw.get("exclude_modules")):
                continue
            where = "no tensor of the file" if target in known else "no module of the base"
            yield f"target_modules names `{shown(target)}`, and that matches {where}"
    elif targets != "all-linear":
        patterns = _Patterns()
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


def _value_problems(file: BinaryIO, pairs: Mapping[str, Mapping[str, Tensor]]) -> Iterator[str]:
    """NaN, infinity, and an adapter whose every product is zero."""
    effect = False
    for pair in pairs.values():
        moves = True
        for half in ("A", "B"):
            finite, zero = _scan(file, pair[half])
            if not finite:
                yield f"`{shown(pair[half].name)}` holds NaN or infinity"
            moves = moves and not zero
        effect = effect or moves
    if not effect:
        yield "every lora_B (or its lora_A) is zero, so the adapter would change nothing: was it saved before training?"


def _scan(file: BinaryIO, tensor: Tensor) -> tuple[bool, bool]:
    """(all finite, all zero), from the bits: NumPy has no bfloat16."""
    import numpy as np

    kind, exponent = _FLOATS[tensor.dtype]
    width = np.dtype(kind).itemsize
    finite, zero = True, True
    file.seek(tensor.start)
    left = tensor.end - tensor.start
    while left:
        data = file.read(min(left, 8 << 20))
        if not data:
            raise AdapterRejected(f"{WEIGHTS} was cut short while it was read; send it again")
        left -= len(data)
        bits = np.frombuffer(data, kind)
        finite = finite and not bool(((bits & exponent) == exponent).any())
        zero = zero and not bool((bits & ((1 << (8 * width - 1)) - 1)).any())
    return finite, zero


# Reading what strangers wrote


def sniff(head: bytes) -> str | None:
    """What these first bytes are, if they are something that people send instead of safetensors."""
    if head.startswith(b"PK\x03\x04"):
        return "a zip file, which is how PyTorch writes pickles (.bin, .pt)"
    if re.match(rb"\x80[\x02-\x05][cX}\]\x8a\x95(q]", head):
        return "a Python pickle"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer and not the file it points to"
    if head.startswith(b"GGUF"):
        return "a GGUF file"
    if head.startswith(b"\x1f\x8b"):
        return "a gzip file"
    if head.lstrip()[:1] == b"<":
        return "an HTML page"
    return None


def _not_safetensors(file: BinaryIO) -> NoReturn:
    file.seek(0)
    head = file.read(64)
    what = sniff(head) or ("empty" if not head else "damaged, or something else under that name")
    raise AdapterRejected(
        f"{WEIGHTS} is not a safetensors file: it is {what}; save the adapter with save_pretrained(..., "
        "safe_serialization=True) and send that"
    )


def open_plain(path: Path) -> BinaryIO:
    """A plain file, or AdapterRejected: no link, no pipe, no folder."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        raise AdapterRejected(f"{path.name} is missing; an adapter is {CONFIG} and {WEIGHTS} side by side") from None
    except OSError as refused:
        raise AdapterRejected(f"{path.name} cannot be read ({refused.strerror}); send a plain file") from refused
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise AdapterRejected(f"{path.name} is not a plain file; send a plain file")
    return os.fdopen(file, "rb")


def _json(data: bytes, what: str) -> Any:
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as wrong:
        reason = "too deeply nested" if isinstance(wrong, RecursionError) else shown(wrong)
        raise AdapterRejected(
            f"{what} is not the JSON it should be ({reason}); send the file as PEFT saved it"
        ) from wrong


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _whole(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 31


def _positive(value: Any) -> bool:
    # A JSON integer may be too large for a float.
    return type(value) in (int, float) and 0 < value < 1e30


def _raise(problems: list[str], config: Config) -> None:
    if not problems:
        return
    trained = f" (it says it was trained on {shown(config.base)})" if config.base else ""
    raise AdapterRejected(
        _sentence(problems, f"this adapter does not fit the base model{trained}"), problems=_bounded(problems)
    )


def _sentence(problems: list[str], opening: str) -> str:
    if len(problems) == 1:
        return f"{opening}: {problems[0]}"
    return f"{opening}: {len(problems)} things are wrong, first of all that {problems[0]}"


def _bounded(problems: list[str]) -> list[str]:
    more = len(problems) - _SHOWN_PROBLEMS
    return problems if more <= 0 else [*problems[:_SHOWN_PROBLEMS], f"... and {more} more"]
