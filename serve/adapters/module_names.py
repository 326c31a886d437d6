"""How a base's modules are called in an adapter's file.

A model with a head calls its layers `model.layers.0...`; the same model without one, as AutoModel gives it to whoever
trains embeddings, `layers.0...`. A base of either kind takes adapters of both.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import accumulate, islice

# What models with a head call the one without (Transformers' `base_model_prefix`).
BACKBONES = ("model", "bert", "roberta", "transformer")
PREFIX = "base_model.model."

# Tensors of a file that are looked at: a trainer calls all modules by one kind of name.
LOOKED_AT = 1000

Modules = Mapping[str, tuple[int, int]]


def bare(name: str) -> str:
    """What a model without a head calls a module."""
    first, _, rest = name.partition(".")
    return rest if rest and first in BACKBONES else name


def spellings(name: str) -> Iterator[str]:
    """A module's name, and what the same model calls it with another head or with none."""
    yield name
    yield bare(name)
    for backbone in BACKBONES:
        yield f"{backbone}.{bare(name)}"


def as_in_file(modules: Modules, tensors: Iterable[str]) -> Modules:
    """The base's modules, called what an adapter's file with these tensors calls them."""
    depth = max((name.count(".") for name in modules), default=0) + 2  # a backbone's name may come before it
    names = [name.removeprefix(PREFIX).split(".", depth)[:depth] for name in islice(tensors, LOOKED_AT)]
    without = {bare(name): shape for name, shape in modules.items()}
    called = [modules, without]
    if without.keys() == modules.keys():
        called += ({f"{backbone}.{name}": shape for name, shape in modules.items()} for backbone in BACKBONES)
    return max(called, key=lambda each: _fitting(each, names))  # the first of those that fit as well


def _fitting(modules: Collection[str], names: Iterable[list[str]]) -> int:
    """How many of the names, in parts, begin with a module's."""
    return sum(any(name in modules for name in accumulate(parts, "{}.{}".format)) for parts in names)
