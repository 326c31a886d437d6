"""`loradock plan`, `backup`, `restore` and `batch`: what an operator does beside a server."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from serve.cli.terminal import URL, Key, Url, example, json_option, table
from serve.config import ADAPTERS, load
from serve.errors import ConfigError
from serve.names import shown

# Lines of a batch that failed and are told on the terminal.
SHOWN_FAILURES = 20

if TYPE_CHECKING:
    from serve.models.memory_plan import Plan

DataDir = Annotated[Path | None, typer.Option("--data-dir", help="As `loradock serve` takes it.", show_default=False)]


def register(app: typer.Typer) -> None:
    """Add the commands to `loradock`."""
    app.command(
        epilog=example("loradock plan ./my-model --max-loras 16 --max-lora-rank 32", "loradock plan smollm2 --json")
    )(plan)
    app.command(epilog=example("loradock backup loradock.tar"))(backup)
    app.command(epilog=example("loradock restore loradock.tar --data-dir ./restored"))(restore)
    app.command(epilog=example("loradock batch questions.jsonl --out answers.jsonl"))(batch)


def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint directory, a hub id, or smollm2.")],
    max_loras: Annotated[int, typer.Option(min=1, help="Adapters in one batch.")] = ADAPTERS["max_loras"],
    max_cpu_loras: Annotated[int, typer.Option(min=1, help="Adapters in memory.")] = ADAPTERS["max_cpu_loras"],
    max_lora_rank: Annotated[int, typer.Option(min=1, help="Their rank.")] = ADAPTERS["max_lora_rank"],
    kv_cache_memory_bytes: Annotated[
        str | None, typer.Option(help="As 4GiB (default: what the server would take).", show_default=False)
    ] = None,
    cpu_weights: Annotated[str, typer.Option(help="As the server takes it: auto, int8, int4.")] = "auto",
    as_json: Annotated[bool, json_option("Print the sizes as JSON, in bytes.")] = False,
) -> None:
    """Say how much memory a model takes with its adapters, and how much context fits."""
    from serve.config import size
    from serve.models.checkpoint import find
    from serve.models.memory_plan import plan as planned

    cache = None if kv_cache_memory_bytes is None else size(kv_cache_memory_bytes)
    checkpoint = find(model, load([], {}).cache_dir)
    load([model, "--cpu-weights", cpu_weights], {})  # its sentence, if there is no such setting
    memory = planned(
        checkpoint,
        max_loras=max_loras,
        max_cpu_loras=max_cpu_loras,
        rank=max_lora_rank,
        kv_cache=cache,
        cpu_weights=cpu_weights,
    )
    if as_json:
        computed = {"tokens": memory.tokens, "total": memory.total, "to_swap": _to_swap(memory), "fits": memory.fits}
        typer.echo(json.dumps({"model": model, **dataclasses.asdict(memory), **computed}, indent=2))
        raise typer.Exit(0 if memory.fits else 1)
    rows = [
        ("weights", _mib(memory.weights)),
        (
            "KV cache",
            f"{_mib(memory.kv_cache)}, {memory.tokens} tokens of context at {memory.kv_token / 1024:.0f} KiB each",
        ),
        (f"{max_loras} slots", _mib(memory.slots)),
        (
            f"{max_cpu_loras} adapters in memory",
            f"{_mib(memory.host)}, {_mib(memory.adapter)} each at rank {max_lora_rank}",
        ),
        ("processes and graphs", _mib(memory.overhead)),
        (
            "together",
            f"{_mib(memory.total)}; {_mib(memory.free)} are free" + ("" if memory.fits else ": it does not fit"),
        ),
        (
            "beside it, to swap the base",
            _mib(_to_swap(memory)),
        ),
    ]
    typer.echo(table([(name, value) for name, value in rows]))
    raise typer.Exit(0 if memory.fits else 1)


def _to_swap(memory: Plan) -> int:
    """What it takes while a second engine starts beside the first."""
    return memory.total + memory.weights + memory.kv_cache + memory.slots + memory.overhead


def backup(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The tar file to write.")],
    data_dir: DataDir = None,
) -> None:
    """Write registry, adapters and files of batches into one file; the server may run meanwhile."""
    from serve.adapters.registry.backup import backup as write

    config = _config(data_dir)
    written = write(config.data_dir, file.absolute(), config.registry)
    typer.echo(f"{file}: {written['adapters']} adapters, {written['files']} files of batches, {_mib(written['bytes'])}")


def restore(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `loradock backup` wrote.")],
    data_dir: DataDir = None,
) -> None:
    """Make a data directory from a backup; every adapter's bytes are checked."""
    from serve.adapters.registry.backup import restore as read

    config = _config(data_dir)
    restored = read(file, config.data_dir)
    typer.echo(f"{config.data_dir}: {restored['adapters']} adapters, {restored.get('files', 0)} files of batches")


def batch(
    file: Annotated[Path, typer.Argument(metavar="INPUT", help="OpenAI's batch format: a JSON object a line.")],
    out: Annotated[Path, typer.Option("--out", help="Where the answers go; requests answered there are skipped.")],
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at once, where the server has no /v1/batches.")] = 8,
    url: Url = URL,
    key: Key = None,
) -> None:
    """Answer a file of requests after all other requests; run again, it continues where it stopped."""
    from rich.progress import Progress

    from serve.client.batch import answered, failures, read
    from serve.client.server_batch import answer

    jobs = read(file)
    done = answered(out)
    left = [job for job in jobs if job.id not in done]
    with Progress(disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(file.name, total=len(jobs), completed=len(jobs) - len(left))
        failed = asyncio.run(
            answer(left, out, url=url, key=key, concurrency=concurrency, progress=lambda _: bar.advance(task))
        )
    reasons = list(failures(out, left))
    for id, reason in reasons[:SHOWN_FAILURES]:
        typer.echo(f"{shown(id, 60)}: {shown(reason, 300)}", err=True)
    if len(reasons) > SHOWN_FAILURES:
        typer.echo(f"... and {len(reasons) - SHOWN_FAILURES} more: {out} has their lines", err=True)
    typer.echo(f"{out}: {len(left) - failed} answered, {failed} failed, {len(jobs) - len(left)} were there already")
    raise typer.Exit(1 if failed else 0)


def _config(data_dir: Path | None) -> Any:
    try:
        return load(["--data-dir", str(data_dir)] if data_dir else [])
    except ConfigError:
        if data_dir is None:
            raise
        return load(["--data-dir", str(data_dir)], {})  # what else a server needs is none of a backup's business


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.0f} MiB" if size < 10 << 30 else f"{size / (1 << 30):.1f} GiB"
