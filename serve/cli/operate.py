"""`loradock backup`, `restore` and `batch`: what an operator does beside a server."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from serve.cli.terminal import URL, Key, Url, counted, example, mib
from serve.config import Config, load
from serve.errors import ConfigError
from serve.names import shown

# Lines of a batch that failed and are told on the terminal.
SHOWN_FAILURES = 20

DataDir = Annotated[Path | None, typer.Option("--data-dir", help="As `loradock serve` takes it.", show_default=False)]


def register(app: typer.Typer, panel: str) -> None:
    """Add the commands to `loradock`."""
    app.command(epilog=example("loradock backup loradock.tar"), rich_help_panel=panel)(backup)
    restored = example("loradock restore loradock.tar --data-dir ./restored")
    app.command(epilog=restored, rich_help_panel=panel)(restore)
    app.command(epilog=example("loradock batch questions.jsonl --out answers.jsonl"), rich_help_panel=panel)(batch)


def backup(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The tar file to write.")],
    data_dir: DataDir = None,
) -> None:
    """Write registry, adapters and batch files into one file.

    From a folder of this machine; the server may run meanwhile.
    """
    from serve.adapters.registry.backup import backup as write

    config = _local(data_dir, "backup")
    written = write(config.data_dir, file.absolute(), config.registry)
    typer.echo(f"{file}: {_held(written)}, {mib(written['bytes'])}, from {config.data_dir}")


def restore(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `loradock backup` wrote.")],
    data_dir: DataDir = None,
) -> None:
    """Make a data directory from a backup.

    Every adapter's bytes are checked.
    """
    from serve.adapters.registry.backup import restore as read

    config = _local(data_dir, "restore")
    restored = read(file, config.data_dir)
    typer.echo(f"{config.data_dir}: {_held(restored)}")


def _held(counts: Mapping[str, Any]) -> str:
    versions, files = counted(counts["adapters"], "version"), counted(counts.get("files", 0), "file")
    return f"{versions} of adapters, {files} of batches"


def batch(
    file: Annotated[Path, typer.Argument(metavar="INPUT", help="OpenAI's batch format: a JSON object a line.")],
    out: Annotated[Path, typer.Option("--out", help="Where the answers go; requests answered there are skipped.")],
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at once, where the server has no /v1/batches.")] = 8,
    url: Url = URL,
    key: Key = None,
) -> None:
    """Answer a file of requests after all other requests.

    Run again, it continues where it stopped.
    """
    from rich.progress import Progress

    from serve.client.batch import answered, failures, read
    from serve.client.server_batch import answer

    jobs = read(file)
    done = answered(out)
    left = [job for job in jobs if job.id not in done]

    def tell(words: str) -> None:
        typer.echo(words, err=True)

    with Progress(disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(file.name, total=len(jobs), completed=len(jobs) - len(left))
        failed = asyncio.run(
            answer(
                left, out, url=url, key=key, concurrency=concurrency, progress=lambda _: bar.advance(task), tell=tell
            )
        )
    reasons = list(failures(out, left))
    for id, reason in reasons[:SHOWN_FAILURES]:
        typer.echo(f"{shown(id, 60)}: {shown(reason, 300)}", err=True)
    if len(reasons) > SHOWN_FAILURES:
        typer.echo(f"... and {len(reasons) - SHOWN_FAILURES} more: {out} has their lines", err=True)
    typer.echo(f"{out}: {len(left) - failed} answered, {failed} failed, {len(jobs) - len(left)} were there already")
    raise typer.Exit(1 if failed else 0)


def _local(data_dir: Path | None, command: str) -> Any:
    """The configuration, unless this machine's default folder is only a guess for the server at LORADOCK_URL."""
    server = os.environ.get("LORADOCK_URL")
    config = _config(data_dir)
    if server and data_dir is None and config.data_dir == Config().data_dir:
        raise ConfigError(
            f"`loradock {command}` works on a folder of this machine, not on the server in LORADOCK_URL ({server}): "
            f"run it where that server runs, with its folder: --data-dir DIR ({config.data_dir} is the default)"
        )
    return config


def _config(data_dir: Path | None) -> Any:
    try:
        return load(["--data-dir", str(data_dir)] if data_dir else [])
    except ConfigError:
        if data_dir is None:
            raise
        return load(["--data-dir", str(data_dir)], {})  # what else a server needs is none of a backup's business
