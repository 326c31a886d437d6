"""`loradock plan`: what a model and its adapters take of this machine or of named GPUs, and how it is started."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from serve.cli.terminal import counted, example, json_option, mib, table
from serve.config import ADAPTERS, load

if TYPE_CHECKING:
    from serve.models.gpu_plan import GpuPlan
    from serve.models.memory_plan import Plan


def register(app: typer.Typer, panel: str) -> None:
    """Add the command to `loradock`."""
    app.command(
        epilog=example(
            "loradock plan ./my-model --max-loras 16 --max-lora-rank 32",
            "loradock plan meta-llama/Llama-3.1-8B-Instruct --gpu h100",
            "loradock plan Qwen/Qwen3-32B --gpu 2xa100-40 --json",
        ),
        rich_help_panel=panel,
    )(plan)


def plan(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A checkpoint directory, a GGUF file, a hub id, or smollm2; see --gpu."),
    ],
    gpu: Annotated[
        str | None,
        typer.Option(
            help="Plan for such GPUs, from anywhere: t4, a10, l4, l40s, a100-40, a100-80, h100, h200, b200, or 2xh100. "
            "The sizes of models that many serve are known without a network.",
            show_default=False,
        ),
    ] = None,
    max_loras: Annotated[
        int | None, typer.Option(min=1, help="Adapters in one batch (default: what the server would take).")
    ] = None,
    max_cpu_loras: Annotated[int, typer.Option(min=1, help="Adapters in memory.")] = ADAPTERS["max_cpu_loras"],
    max_lora_rank: Annotated[int, typer.Option(min=1, help="Their rank.")] = ADAPTERS["max_lora_rank"],
    kv_cache_memory_bytes: Annotated[
        str | None, typer.Option(help="As 4GiB (default: what the server would take).", show_default=False)
    ] = None,
    cpu_weights: Annotated[str, typer.Option(help="As the server takes it: auto, int8, int4.")] = "auto",
    as_json: Annotated[bool, json_option("Print the sizes as JSON, in bytes.")] = False,
) -> None:
    """Say how much memory a model and its adapters take.

    And how much context fits.
    """
    from serve.config import size
    from serve.cpu_kernels.build import keeps_gguf
    from serve.models import gpu_plan, gpus, hardware
    from serve.models.checkpoint import find, gguf_file
    from serve.models.dimensions import dimensions
    from serve.models.memory_plan import plan as planned

    cache = None if kv_cache_memory_bytes is None else size(kv_cache_memory_bytes)
    options = {"rank": max_lora_rank, "max_loras": max_loras, "max_cpu_loras": max_cpu_loras, "kv_cache": cache}
    cards = [] if gpu or hardware.on_cpu() else gpus.cards()
    if gpu or cards:
        card, count = gpu_plan.parse(gpu) if gpu else (cards[0], 1)
        checkpoint = find(model, load([], {}).cache_dir) if model == "smollm2" else str(gguf_file(model) or model)
        sizes = dimensions(checkpoint)
        on_gpu = gpu_plan.plan(checkpoint, sizes, card, count, **options)  # type: ignore[arg-type]
        least = None if on_gpu.fits else gpu_plan.smallest(checkpoint, sizes, card, **options)
        _print_gpu(model, on_gpu, max_lora_rank, least, as_json)
        raise typer.Exit(0 if on_gpu.fits else 1)
    load([model, "--cpu-weights", cpu_weights], {})  # its sentence, if there is no such setting
    checkpoint = find(model, load([], {}).cache_dir, keeps_gguf=keeps_gguf("auto", cpu_weights, {}))
    loras = max_loras or ADAPTERS["max_loras"]
    memory = planned(
        checkpoint,
        max_loras=loras,
        max_cpu_loras=max_cpu_loras,
        rank=max_lora_rank,
        kv_cache=cache,
        cpu_weights=cpu_weights,
    )
    _print_cpu(model, memory, loras, max_cpu_loras, max_lora_rank, as_json)
    raise typer.Exit(0 if memory.fits else 1)


def _print_cpu(model: str, memory: Plan, loras: int, cpu_loras: int, rank: int, as_json: bool) -> None:
    if as_json:
        computed = {"tokens": memory.tokens, "total": memory.total, "to_swap": _to_swap(memory), "fits": memory.fits}
        typer.echo(json.dumps({"model": model, **dataclasses.asdict(memory), **computed}, indent=2))
        return
    context = f"{memory.tokens} tokens of context at {memory.kv_token / 1024:.0f} KiB each"
    free = f"{mib(memory.free)} are free" + ("" if memory.fits else ": it does not fit")
    rows = [
        ("weights", mib(memory.weights)),
        ("KV cache", f"{mib(memory.kv_cache)}, {context}"),
        (counted(loras, "slot"), mib(memory.slots)),
        (
            f"{counted(cpu_loras, 'adapter')} in memory",
            f"{mib(memory.host)}, {mib(memory.adapter)} each at rank {rank}",
        ),
        ("a whole table of an adapter's own", f"{mib(memory.table)} more, mapped from its file"),
        ("processes and graphs", mib(memory.overhead)),
        ("together", f"{mib(memory.total)}; {free}"),
        ("beside it, to swap the base", mib(_to_swap(memory))),
    ]
    typer.echo(table(rows))


def _to_swap(memory: Plan) -> int:
    """What it takes while a second engine starts beside the first."""
    return memory.total + memory.weights + memory.kv_cache + memory.slots + memory.overhead


def _print_gpu(model: str, on_gpu: GpuPlan, rank: int, least: int | None, as_json: bool) -> None:
    command = shlex.join(start_command(model, on_gpu, rank)) if on_gpu.fits else ""
    if as_json:
        shown: dict[str, Any] = dataclasses.asdict(on_gpu) | {"gpu": on_gpu.card.name, "card": on_gpu.card.total}
        computed = {"tokens": on_gpu.tokens, "total": on_gpu.total, "fits": on_gpu.fits, "streams": on_gpu.streams}
        more = {"max_model_len": on_gpu.max_model_len, "swaps_beside": on_gpu.swaps_beside, "command": command}
        typer.echo(json.dumps({"model": model, **shown, **computed, **more, "least_gpus": least}, indent=2))
        return
    typer.echo(table(gpu_rows(on_gpu, rank)))
    if on_gpu.fits:
        typer.echo(command)
    else:
        many = f"it fits on {least} of them (--gpu {least}x...)" if least else "eight of them are too few"
        typer.echo(f"{model} does not fit on {on_gpu.gpus} x {on_gpu.card.name}: {many}; or quantize it")


def gpu_rows(on_gpu: GpuPlan, rank: int) -> list[tuple[str, str]]:
    """What is shown of a plan, by name."""
    each = " on each" if on_gpu.gpus > 1 else ""
    length = on_gpu.max_model_len
    context = f"{on_gpu.tokens} tokens of context at {on_gpu.kv_token / 1024:.0f} KiB each"
    return [
        ("GPUs", f"{on_gpu.gpus} x {on_gpu.card.name}, {mib(on_gpu.card.total)}"),
        ("weights", mib(on_gpu.weights) + each),
        (counted(on_gpu.max_loras, "slot"), f"{mib(on_gpu.slots)}{each}, rank {rank}"),
        ("activations, graphs (estimate)", mib(on_gpu.activations) + each),
        ("KV cache", f"{mib(on_gpu.kv_cache)}{each}, {context}" if on_gpu.kv_cache > 0 else "nothing is left for it"),
        ("streams of 8,192 tokens", str(on_gpu.streams)),
        ("longest request", f"{length or on_gpu.context} of the model's {on_gpu.context} tokens"),
        ("a second engine beside it", "fits" if on_gpu.swaps_beside else "does not fit: swap with drain_first"),
        ("the host's memory for adapters", f"{mib(on_gpu.host)}, {mib(on_gpu.adapter)} each"),
    ]


def start_command(model: str, on_gpu: GpuPlan, rank: int) -> list[str]:
    """The words of the command that serves it so."""
    words = ["loradock", "serve", model if not Path(model).is_dir() else str(Path(model))]
    if on_gpu.gpus > 1:
        words += ["--tensor-parallel-size", str(on_gpu.gpus)]
    words += ["--max-loras", str(on_gpu.max_loras), "--max-lora-rank", str(rank)]
    if on_gpu.max_model_len is not None:
        words += ["--max-model-len", str(on_gpu.max_model_len)]
    return words
