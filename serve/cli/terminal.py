"""What the commands that speak to a running server share.

Exit codes: 0 done, 1 the server refused, 2 the command is wrong, 3 no server answered.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from serve.errors import ConfigError, LoradockError

if TYPE_CHECKING:
    from serve.client.adapter_client import AdapterClient

Url = Annotated[str, typer.Option("--url", envvar="LORADOCK_URL", help="The server.")]
Key = Annotated[str | None, typer.Option("--key", envvar="LORADOCK_KEY", help="An API key that may do this.")]
Json = Annotated[bool, typer.Option("--json", help="Print the server's answer as JSON.")]
URL = "http://127.0.0.1:8000"


def example(*lines: str) -> str:
    """The end of a command's --help."""
    return "\b\nExample:\n" + "\n".join(f"  {line}" for line in lines)


@contextmanager
def connected(group: str, url: str, key: str | None, timeout: float = 300.0) -> Iterator[AdapterClient]:
    """A client whose errors become a sentence of `loradock GROUP` and an exit code."""
    from serve.client.adapter_client import AdapterClient, Unreachable

    try:
        with AdapterClient(url, key, timeout=timeout) as client:
            yield client
    except LoradockError as error:
        typer.echo(f"loradock {group}: {error.message}", err=True)
        for problem in getattr(error, "problems", []):
            typer.echo(f"  - {problem}", err=True)
        raise typer.Exit(2 if isinstance(error, ConfigError) else 3 if isinstance(error, Unreachable) else 1) from error


def say(answer: dict[str, Any], as_json: bool, sentence: Callable[[dict[str, Any]], str]) -> None:
    """The server's answer as it came, or what `sentence` makes of it."""
    typer.echo(json.dumps(answer, indent=2) if as_json else sentence(answer))


def write_answer(file: Path, content: bytes) -> None:
    """Write what the server sent; ConfigError says why it cannot be."""
    try:
        file.write_bytes(content)
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error}") from error


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows as aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
