"""`loradock baseline`: what a version of an adapter is held against, before its first traffic.

Exit codes: 0 done, 1 the server refused, 2 the command is wrong, 3 no server answered.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from serve.cli.arguments import Commands, VersionOption, name_and_version
from serve.cli.terminal import URL, Json, Key, Url, connected, example, say, write_answer
from serve.errors import ConfigError

# Seconds: a thousand answers take their time.
PATIENCE = 86_400.0

baseline_app = typer.Typer(
    name="baseline",
    help="Give a version what to compare with before any traffic.",
    no_args_is_help=True,
    rich_markup_mode=None,
    cls=Commands,
)


@baseline_app.command(epilog=example("loradock baseline build tone@v3 prompts.jsonl"))
def build(
    name: Annotated[str, typer.Argument(metavar="NAME[@VERSION]", help="The adapter.")],
    file: Annotated[
        Path,
        typer.Argument(
            metavar="PROMPTS", help='JSON lines: a text, {"prompt": text}, or {"messages": [...]}; 1,000 are good.'
        ),
    ],
    version: VersionOption = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Longest answer.")] = 64,
    url: Url = URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Let a version answer prompts, as what to compare with.

    Later traffic is compared with them. Takes as long as the answers do.
    """
    asked = prompts(file)
    with connected("baseline", url, key, timeout=PATIENCE) as client:
        name, version = name_and_version(name, version)
        answer = client.build_baseline(name, asked, version, max_tokens)
    say(answer, as_json, _built)


@baseline_app.command(epilog=example("loradock baseline save tone@v3 baseline.zip"))
def save(
    name: Annotated[str, typer.Argument(metavar="NAME[@VERSION]", help="The adapter.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to.")],
    version: VersionOption = None,
    url: Url = URL,
    key: Key = None,
) -> None:
    """Save a version's baseline to a file.

    To ship it with the adapter to another server over the same model.
    """
    with connected("baseline", url, key) as client:
        write_answer(file, client.save_baseline(*name_and_version(name, version)))
    typer.echo(f"{file} holds the baseline of {name}")


@baseline_app.command(epilog=example("loradock baseline ship tone baseline.zip"))
def ship(
    name: Annotated[str, typer.Argument(metavar="NAME[@VERSION]", help="The adapter.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `save` wrote.", exists=True, dir_okay=False)],
    version: VersionOption = None,
    url: Url = URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Give a version a saved baseline.

    It must be made by the same adapter bytes over the same model.
    """
    with connected("baseline", url, key) as client:
        name, version = name_and_version(name, version)
        answer = client.ship_baseline(name, file.read_bytes(), version)
    say(answer, as_json, _built)


def prompts(file: Path) -> list[Any]:
    """The prompts of a file of JSON lines; ConfigError says which line is none."""
    try:
        lines = file.read_text().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    texts_or_messages = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prompt = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"line {number} of {file} is not JSON: {error}") from error
        if isinstance(prompt, dict):
            prompt = prompt.get("prompt") or prompt.get("messages")
        if not isinstance(prompt, str | list) or not prompt:
            raise ConfigError(f'line {number} of {file} is neither a text, {{"prompt": ...}} nor {{"messages": ...}}')
        texts_or_messages.append(prompt)
    return texts_or_messages


def _built(answer: dict[str, Any]) -> str:
    rows = ", ".join(f"{count} of {signal}" for signal, count in answer["requests"].items())
    return f"{answer['name']}@v{answer['version']} is held against {rows}"
