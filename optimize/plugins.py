"""What a folder of ours, or somebody else's package, adds: steps of a recipe, methods of rounding.

Of ours each module of the folder is looked at; an installed package says by an entry point of the group where its
object is. Nothing here imports torch, nor may what is found.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import metadata
from typing import Any

from optimize.errors import RecipeError


@cache
def found(package: str, group: str, attribute: str, ending: str = "") -> Mapping[str, Any]:
    """name -> the object. `attribute` is how modules of ours call it, `ending` how their names end."""
    offers: dict[str, Any] = {}
    for offer in (*_of_folder(package, attribute, ending), *_of_packages(group)):
        if offers.setdefault(offer.name, offer) is not offer:
            raise RecipeError(f"two packages offer {offer.name!r} in {group}: uninstall one of them")
    return offers


def _of_folder(package: str, attribute: str, ending: str) -> Iterator[Any]:
    folder = importlib.import_module(package)
    for module in pkgutil.walk_packages(folder.__path__, f"{package}."):
        if not module.ispkg and module.name.endswith(ending):
            yield getattr(importlib.import_module(module.name), attribute)


def _of_packages(group: str) -> Iterator[Any]:
    for point in metadata.entry_points(group=group):
        try:
            yield point.load()
        except Exception as error:
            owner = point.dist.name if point.dist else "a package"
            raise RecipeError(
                f"{owner} offers {point.name!r} in {group}, and {point.value} cannot be loaded "
                f"({type(error).__name__}: {error}): mend it, or pip uninstall {owner}"
            ) from error
