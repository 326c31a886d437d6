"""What a patch is, and a function of vLLM's that it replaces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["correctness", "security", "speed"]


@dataclass(frozen=True, slots=True)
class Function:
    """One function of vLLM's, and what takes its place.

    By setting an attribute of vLLM's, or, with `via`, by a subclass that vLLM is handed (`HOOKS`). Without a
    replacement the module that `via` names does it, if the patch is on, for single objects or in its own way.
    """

    place: str  # "module:function" or "module:Class.method"
    digest: str  # of its source in PINNED
    replacement: str = ""  # "module:function"; it gets what it replaces as its first argument
    changed: Mapping[str, str] = field(default_factory=dict)  # version: digest, where it differs and ours fits too
    fixed: Mapping[str, str] = field(default_factory=dict)  # version: digest, where vLLM does it right by itself
    copies: str = ""  # the package whose modules have imported the function by its name
    via: str = ""

    def __str__(self) -> str:
        module, _, name = self.place.partition(":")
        return name if "." in name else f"{module.rpartition('.')[2]}.{name}"

    @property
    def fits(self) -> frozenset[str]:
        return frozenset({self.digest, *self.changed.values()})


@dataclass(frozen=True, slots=True)
class Patch:
    """Functions that are replaced together, or none of them.

    A misfit of a patch for speed turns it off; of another kind it ends the start.
    """

    name: str
    kind: Kind
    why: str
    functions: tuple[Function, ...]
    upstream: str = ""  # vLLM's issue or pull request
    needs: tuple[str, ...] = ()  # patches without which this one does nothing
    on: Literal["cpu", "everywhere"] = "everywhere"
    process: Literal["all", "server"] = "all"
    # A setting of the environment and the values with which it is wanted.
    wanted: tuple[str, frozenset[str]] | None = None
