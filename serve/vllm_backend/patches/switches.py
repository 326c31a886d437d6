"""Which patches an operator wants: the setting `vllm_patches`, read alike by the server, its engines and doctor."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from serve.vllm_backend.patches.patch import Patch
from serve.vllm_backend.patches.table import PATCHES, named

VARIABLE = "LORADOCK_VLLM_PATCHES"
ALL = "all"
CORRECTNESS = "correctness"
WITHOUT = "no-"


@dataclass(frozen=True, slots=True)
class Switches:
    """`speed`: patches for speed are on, except for those that are named in `off`."""

    speed: bool = True
    off: frozenset[str] = frozenset()

    def allow(self, patch: Patch) -> bool:
        return patch.name not in self.off and (self.speed or patch.kind != "speed")

    @property
    def kernels(self) -> bool:
        """Whether the kernels for adapters may be used on a CPU."""
        return self._allow("lora-kernels")

    @property
    def fused(self) -> bool:
        """Whether a model may run in one call a step on a CPU."""
        return self._allow("lora-kernels", "fused-step")

    @property
    def forks(self) -> bool:
        """Whether vLLM's processes may come from a fork server."""
        return self._allow("fork-server")

    @property
    def drafts(self) -> bool:
        """Whether speculation may be on."""
        return self._allow("speculation", *named("speculation").needs, "lora-kernels")

    def _allow(self, *names: str) -> bool:
        return all(self.allow(named(name)) for name in names)


def parse(words: Iterable[str]) -> Switches:
    """`all` or `correctness`, and `no-NAME` for each patch that is left out; ValueError, a sentence, otherwise."""
    names = sorted(patch.name for patch in PATCHES)
    speed, off = True, set()
    for word in filter(None, words):
        name = word.removeprefix(WITHOUT)
        if word in (ALL, CORRECTNESS):
            speed = word == ALL
        elif word.startswith(WITHOUT) and name in names:
            off.add(name)
        else:
            raise ValueError(
                f"vllm_patches takes {ALL} or {CORRECTNESS}, and no-NAME for each patch to leave out, not {word!r}; "
                f"names: {', '.join(names)}"
            )
    return Switches(speed, frozenset(off))


def written(words: Iterable[str]) -> str:
    """As the environment of an engine has it."""
    return ",".join(words)
