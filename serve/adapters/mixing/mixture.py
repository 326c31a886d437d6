"""A mixture: versions of adapters with weights, which the engine knows as one adapter.

    tone+legal        tone:0.7+legal:0.3        tone@v2:-0.5+legal        tone:1.5

A part is a model's name, of a version too, and a weight, 1 unless it is stated. A request may list them instead:

    "adapters": [{"name": "tone", "weight": 0.7}, {"name": "legal", "weight": 0.3}]
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from serve.adapters.adapter import Adapter
from serve.errors import BadRequest
from serve.names import MIXED, accounted_name, full_name, part_label, shown

MAX_PARTS = 8
MAX_WEIGHT = 100.0

_NAME = re.compile(r"[^:+]+")
_PART = re.compile(r"(?P<name>[^:+]+)(?::(?P<weight>-?[0-9]{1,3}(?:\.[0-9]{1,6})?))?")


@dataclass(frozen=True, slots=True)
class Part:
    """A version, and how much of it."""

    adapter: Adapter
    weight: float


@dataclass(frozen=True, slots=True)
class Mixture(Adapter):
    """Parts in a tenant's answers. Its digest is of their digests, their weights and the tenant: nobody else's cache
    has its blocks."""

    parts: tuple[Part, ...] = ()

    @property
    def is_mixed(self) -> bool:
        return True

    @property
    def names(self) -> list[str]:
        return [part.adapter.name for part in self.parts]

    @property
    def labels(self) -> tuple[str, str]:
        return accounted_name(self.id), MIXED


def is_mixture(model: str) -> bool:
    """The name may be one; no adapter's name holds either character."""
    return "+" in model or ":" in model


def parse(text: str) -> list[tuple[str, float]]:
    """The names and weights that a mixture's name holds."""
    pieces = text.split("+")
    if len(pieces) > MAX_PARTS:
        raise BadRequest(f"a mixture has up to {MAX_PARTS} adapters, not {len(pieces)}", param="model")
    return [parse_part(piece) for piece in pieces]


def parse_part(text: str) -> tuple[str, float]:
    """NAME or NAME:WEIGHT."""
    part = _PART.fullmatch(text.strip())
    if part is None:
        raise BadRequest(
            f"`{shown(text, 80)}` is no part of a mixture: write NAME or NAME:WEIGHT, as tone:0.7+legal:0.3",
            param="model",
        )
    return part["name"], _checked(part["name"], float(part["weight"] or 1))


def listed(adapters: Any) -> str:
    """The name of the mixture that a request's `adapters` lists; weights are rounded to six decimals."""
    parts = adapters if isinstance(adapters, list) else []
    if not 1 <= len(parts) <= MAX_PARTS or not all(map(_is_listed, parts)):
        raise BadRequest(
            f'adapters takes 1 to {MAX_PARTS} objects such as {{"name": "tone", "weight": 0.7}}, not '
            f"{shown(adapters, 80)}",
            param="adapters",
        )
    weights = [_checked(part["name"], round(float(part.get("weight", 1)), 6)) for part in parts]
    if weights == [1]:
        return str(parts[0]["name"])
    pairs = zip(parts, weights, strict=True)
    return "+".join(f"{part['name']}:{f'{weight:.6f}'.rstrip('0').rstrip('.')}" for part, weight in pairs)


def _is_listed(part: Any) -> bool:
    return (
        isinstance(part, dict)
        and part.keys() <= {"name", "weight"}
        and isinstance(part.get("name"), str)
        and _NAME.fullmatch(part["name"]) is not None
        and type(part.get("weight", 1)) in (int, float)
    )


def _checked(name: str, weight: float) -> float:
    """The weight, if a part may have it."""
    if not 0 < abs(weight) <= MAX_WEIGHT:
        raise BadRequest(
            f"the weight of `{shown(name, 80)}` is {weight:g}; it must be from -{MAX_WEIGHT:g} to "
            f"{MAX_WEIGHT:g}, and not 0: leave it out instead",
            param="model",
        )
    return weight


def mixed(parts: Sequence[Part], tenant: str, max_rank: int) -> Mixture:
    """The mixture, for requests of a tenant; BadRequest, if its rank is above `max_rank`."""
    weights: dict[str, float] = {}
    for part in parts:
        weights[part.adapter.digest] = weights.get(part.adapter.digest, 0.0) + part.weight
    by_digest = {part.adapter.digest: part.adapter for part in parts}
    # In one order however they were written, so that they are computed once.
    summed = [Part(by_digest[digest], weight) for digest, weight in sorted(weights.items()) if weight]
    if not summed:
        raise BadRequest("the weights of this mixture add up to nothing: ask the base instead", param="model")
    rank = sum(part.adapter.rank for part in summed)
    if rank > max_rank:
        ranks = " + ".join(str(part.adapter.rank) for part in summed)
        raise BadRequest(
            f"this mixture has rank {ranks} = {rank}, and this engine takes up to {max_rank}: a max_lora_rank of "
            f"{rank} or more would be needed",
            param="model",
        )
    names = [part_label(part.adapter.name, tenant) for part in summed]
    key = json.dumps([tenant, [(part.adapter.digest, repr(part.weight)) for part in summed]])
    return Mixture(
        name=full_name(tenant, "+".join(names) if len(names) > 1 else f"{names[0]}+"),
        version=0,
        digest=hashlib.sha256(key.encode()).hexdigest(),
        rank=rank,
        base=summed[0].adapter.base,
        target_modules=tuple(sorted({module for part in summed for module in part.adapter.target_modules})),
        nbytes=sum(part.adapter.nbytes for part in summed),
        created=max(part.adapter.created for part in summed),
        parts=tuple(summed),
    )
