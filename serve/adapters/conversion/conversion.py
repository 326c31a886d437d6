"""A LoHa, LoKr, VeRA and their like become the nearest LoRA before they are admitted (program.py, beside this module).

The LoRA has the smallest rank that keeps the relative Frobenius error within the bound. If the largest rank that the
server takes does not, the adapter is refused with the rank that it would take.
"""

from __future__ import annotations

import asyncio
import contextvars
import json
import os
import subprocess
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from serve.adapters.adapter import NOTES, WEIGHTS, Limits
from serve.adapters.child_program import running
from serve.adapters.conversion.kinds import check, linears
from serve.adapters.fair_threads import FairThreads
from serve.adapters.peft_config import CONVERTED
from serve.adapters.untrusted import create, open_plain, rejected, write
from serve.errors import AdapterRejected, EngineUnavailable
from serve.names import shown

# What a conversion may take: seconds, and bytes beside what the matrices need.
SECONDS = 300.0
SPARE_BYTES = 1 << 30
PROGRAM = Path(__file__).parent / "program.py"
# The folder beside the LoRA with what it leaves out, as a LoRA of its own.
REMAINDER = "remainder"

_LOOK_SECONDS = 0.1
# Variables that are not handed on: keys, and what engines are told.
_KEPT_BACK = ("LORADOCK_", "VLLM_", "OMP_", "KMP_", "LD_PRELOAD")
_THREAD = FairThreads(1, "adapter-conversion")


@dataclass(frozen=True, slots=True)
class Conversion:
    """What became of an adapter of another kind: `facts` are kept with its version."""

    facts: Mapping[str, Any]
    # A LoRA of what was left out, to be measured; None where next to nothing was.
    remainder: Path | None


def written_bytes(settings: Mapping[str, Any], modules: Mapping[str, tuple[int, int]], limits: Limits) -> int:
    """What a conversion writes at most."""
    return 2 * 4 * limits.max_rank * sum(out + into for out, into in linears(settings, modules).values())


async def convert(
    folder: Path,
    into: Path,
    settings: Mapping[str, Any],
    modules: Mapping[str, tuple[int, int]],
    limits: Limits,
) -> Conversion:
    """Leave a LoRA in the empty folder `into`, with the notes of the adapter in `folder`. One at a time."""
    stop = threading.Event()
    call = partial(_convert, folder, into, settings, modules, limits, stop)
    running = asyncio.get_running_loop().run_in_executor(_THREAD, partial(contextvars.copy_context().run, call))
    try:
        return await running
    except asyncio.CancelledError:
        stop.set()
        raise


def _convert(
    folder: Path,
    into: Path,
    settings: Mapping[str, Any],
    modules: Mapping[str, tuple[int, int]],
    limits: Limits,
    stop: threading.Event,
) -> Conversion:
    modules = check(folder, settings, modules, limits)
    kind, shapes = CONVERTED[settings["peft_type"]], linears(settings, modules)
    matrix = max((out * into for out, into in shapes.values()), default=0)
    nbytes = (folder / WEIGHTS).stat().st_size
    job = {
        "folder": str(folder),
        "into": str(into),
        "kind": settings["peft_type"],
        "settings": settings,
        "modules": shapes,
        "max_rank": limits.max_rank,
        "bound": limits.conversion_error,
        "seconds": SECONDS,
        "memory": SPARE_BYTES + 16 * 4 * matrix + 8 * nbytes + 8 * written_bytes(settings, modules, limits),
    }
    answer = _answer(job, kind, stop)
    if problems := answer.get("problems"):
        raise rejected([shown(problem, 1000) for problem in problems], f"this {kind} adapter cannot be converted")
    if answer.get("too_large"):
        raise AdapterRejected(
            f"this {kind} adapter takes more than {job['memory'] >> 20} MiB to convert, which nothing of its shapes "
            "should: is its configuration right? Else train it as a LoRA"
        )
    for name in NOTES:
        if (folder / name).exists():
            with open_plain(folder / name) as source, create(into / name) as copy:
                write(copy, source.read(NOTES[name]))
    remainder = into / REMAINDER
    facts = {"kind": kind, **answer["facts"], "allowed_error": limits.conversion_error}
    return Conversion(facts, remainder if remainder.is_dir() else None)


def _answer(job: Mapping[str, Any], kind: str, stop: threading.Event) -> dict[str, Any]:
    """What the program says; it is ended with its time, or once `stop` is set."""
    left = SECONDS
    said: bytes | None = json.dumps(job).encode()
    with running(PROGRAM, stderr=subprocess.PIPE, env=_environ()) as process:
        while True:
            try:
                out, err = process.communicate(said, timeout=_LOOK_SECONDS)
                break
            except subprocess.TimeoutExpired:
                said, left = None, left - _LOOK_SECONDS
            if stop.is_set():
                raise EngineUnavailable("the conversion was given up, since nobody waits for it any more")
            if left < 0:
                raise AdapterRejected(
                    f"this {kind} adapter was not converted within {SECONDS:g} s; train it as a LoRA, or merge it "
                    "into its base with `loradock optimize`"
                )
    try:
        answer: dict[str, Any] = json.loads(out)
        return answer
    except ValueError:
        lines = err.decode("utf-8", "replace").strip().splitlines()
        why = lines[-1] if lines else f"exit code {process.returncode}"
    if "ModuleNotFoundError" in why:
        raise AdapterRejected(
            f"this server has no PEFT to convert a {kind} adapter with ({shown(why)}): install loradock with its "
            "extra cpu or gpu"
        )
    raise AdapterRejected(f"this {kind} adapter cannot be converted ({shown(why, 300)}); train it as a LoRA")


def _environ() -> dict[str, str]:
    handed_on = {name: value for name, value in os.environ.items() if not name.startswith(_KEPT_BACK)}
    return {**handed_on, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
