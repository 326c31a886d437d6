"""What the commands that speak to a running server share.

Exit codes: 0 done, 1 the server refused, 2 the command is wrong, 3 no server answered.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from serve.errors import ConfigError, LoradockError

if TYPE_CHECKING:
    from serve.client.adapter_client import AdapterClient

# How help groups the options that most commands have.
SERVER = "Server"

Url = Annotated[str, typer.Option("--url", envvar="LORADOCK_URL", help="Its address.", rich_help_panel=SERVER)]
Key = Annotated[
    str | None,
    typer.Option("--key", envvar="LORADOCK_KEY", help="An API key that may do this.", rich_help_panel=SERVER),
]

# Whether the command that runs was given --json, for its errors.
_as_json: ContextVar[bool] = ContextVar("as_json", default=False)


def json_option(help: str) -> Any:
    """A flag --json, which errors obey too."""

    def noted(value: bool) -> bool:
        _as_json.set(value)
        return value

    return typer.Option("--json", help=help, callback=noted)


Json = Annotated[bool, json_option("Print the server's answer as JSON; an error too, on stderr.")]
URL = "http://127.0.0.1:8000"


def example(*lines: str) -> str:
    """The end of a command's --help."""
    return "\b\nExample:\n" + "\n".join(f"  {line}" for line in lines)


@contextmanager
def connected(group: str, url: str, key: str | None, timeout: float = 300.0) -> Iterator[AdapterClient]:
    """A client whose errors become a sentence of `loradock GROUP` and an exit code."""
    from serve.client.adapter_client import AdapterClient

    with told(group), AdapterClient(url, key, timeout=timeout) as client:
        yield client


@contextmanager
def told(group: str) -> Iterator[None]:
    """Errors become a sentence of `loradock GROUP` and an exit code."""
    from serve.client.api_client import Unreachable

    try:
        yield
    except LoradockError as error:
        say_error(error, f"loradock {group}")
        raise typer.Exit(2 if isinstance(error, ConfigError) else 3 if isinstance(error, Unreachable) else 1) from error


def say_error(error: LoradockError, who: str, *, as_json: bool = False) -> None:
    """The error on stderr: a sentence with its problems below or, after --json, as the server would answer it."""
    if as_json or _as_json.get():
        typer.echo(json.dumps(error.body()), err=True)
        return
    typer.echo(f"{who}: {error.message}", err=True)
    for problem in getattr(error, "problems", []):
        typer.echo(f"  - {problem}", err=True)


def say(answer: dict[str, Any], as_json: bool, sentence: Callable[[dict[str, Any]], str]) -> None:
    """The server's answer as it came, or what `sentence` makes of it."""
    typer.echo(json.dumps(answer, indent=2) if as_json else sentence(answer))


def write_answer(file: Path, content: bytes) -> None:
    """Write what the server sent; ConfigError says why it cannot be."""
    try:
        file.write_bytes(content)
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error}") from error


@contextmanager
def upload_bar(name: str) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"pushing {escape(name)}", total=None)

        def update(sent: int, total: int) -> None:
            description = "the server checks it" if sent == total else f"pushing {escape(name)}"
            progress.update(task, completed=sent, total=total, description=description)

        yield update


def nbytes(size: Any) -> str:
    """A size as people read it; "-" if it is not known."""
    if not isinstance(size, int | float):
        return "-"
    if size < 1 << 20:
        return f"{size / 1024:.1f} KiB"
    return f"{size / (1 << 20):.0f} MiB" if size < 10 << 30 else f"{size / (1 << 30):.1f} GiB"


def counted(number: int, noun: str) -> str:
    """ "1 adapter", "2 adapters"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def portion(weight: float) -> str:
    """A share of the requests as people write it: 10%."""
    return f"{weight * 100:.4g}%"


def age(moment: Any, now: float) -> str:
    """How long ago that was, in its largest unit; "-" if it is not known."""
    if not isinstance(moment, int | float):
        return "-"
    seconds = max(0.0, now - moment)
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows as aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def mib(size: int) -> str:
    """A size in bytes as people read it."""
    return f"{size / (1 << 20):.0f} MiB" if size < 10 << 30 else f"{size / (1 << 30):.1f} GiB"
