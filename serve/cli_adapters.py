"""`loradock adapters`: the adapter API from a terminal or a script.

Exit codes: 0 done, 1 the server refused, 2 the command is wrong, 3 no server answered.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from serve.errors import ConfigError, LoradockError

if TYPE_CHECKING:
    from serve.client import AdapterClient

adapters_app = typer.Typer(
    name="adapters",
    help="Push, list, promote, try out, pin and remove adapters on a running server.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Url = Annotated[str, typer.Option("--url", envvar="LORADOCK_URL", help="The server.")]
Key = Annotated[str | None, typer.Option("--key", envvar="LORADOCK_KEY", help="An API key that may do this.")]
Json = Annotated[bool, typer.Option("--json", help="Print the server's answer as JSON.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="The adapter's public name.")]
Version = Annotated[str, typer.Argument(metavar="VERSION", help="3 or v3.")]
Weight = Annotated[float, typer.Argument(metavar="WEIGHT", min=0, max=1, help="A share from 0 to 1; 0 ends it.")]
_URL = "http://127.0.0.1:8000"


def _example(*lines: str) -> str:
    return "\b\nExample:\n" + "\n".join(f"  {line}" for line in lines)


@adapters_app.command(
    epilog=_example(
        "loradock adapters push support ./support-lora",
        "loradock adapters push support lora.tar.gz",
        "loradock adapters push support hf://our-team/support-lora@main",
    )
)
def push(
    name: Name,
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="A PEFT folder, a .zip or .tar.gz of one, or an hf://, s3:// or file:// that the server fetches.",
        ),
    ],
    promote: Annotated[bool, typer.Option("--promote/--no-promote", help="Make it the live version.")] = True,
    url: Url = _URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Upload an adapter; the same bytes twice are one version."""
    with _client(url, key) as client, _bar(name) as progress:
        if "://" in path:
            answer = client.push_source(name, path, promote=promote)
        else:
            answer = client.push(name, path, promote=promote, progress=progress)
    _print(answer, as_json, _pushed)


@adapters_app.command("list", epilog=_example("loradock adapters list --json | jq -r '.data[].name'"))
def list_(url: Url = _URL, key: Key = None, as_json: Json = False) -> None:
    """List the adapters, with the live version of each."""
    with _client(url, key) as client:
        found = client.list()
    _print({"object": "list", "data": found}, as_json, _listed)


@adapters_app.command(epilog=_example("loradock adapters show support"))
def show(name: Name, url: Url = _URL, key: Key = None, as_json: Json = False) -> None:
    """Show the versions of an adapter, which is live, and its history."""
    with _client(url, key) as client:
        answer = client.show(name)
    _print(answer, as_json, _shown)


@adapters_app.command(epilog=_example("loradock adapters promote support 3", "loradock adapters promote support v3"))
def promote(
    name: Name,
    version: Annotated[str, typer.Argument(metavar="VERSION", help="3 or v3.")],
    expect: Annotated[
        str | None, typer.Option("--expect", metavar="VERSION", help="Only if this version is live now.")
    ] = None,
    url: Url = _URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Make a version the live one."""
    with _client(url, key) as client:
        answer = client.promote(name, _version(version), _version(expect) if expect is not None else None)
    _print(answer, as_json, lambda told: f"{name} v{_version(version)} is live")


@adapters_app.command(epilog=_example("loradock adapters rollback support"))
def rollback(name: Name, url: Url = _URL, key: Key = None, as_json: Json = False) -> None:
    """Make the version live again that was live before."""
    with _client(url, key) as client:
        answer = client.rollback(name)
    _print(answer, as_json, lambda told: f"{name} {_v(_live(told))} is live again")


@adapters_app.command(
    epilog=_example("loradock adapters canary support 3 0.1", "loradock adapters canary support 3 0  # ends it")
)
def canary(
    name: Name, version: Version, weight: Weight, url: Url = _URL, key: Key = None, as_json: Json = False
) -> None:
    """Send a share of an adapter's requests to a version that is not live."""
    with _client(url, key) as client:
        answer = client.canary(name, _version(version), weight)
    _print(answer, as_json, lambda told: _shared(told, "canary", "answers"))


@adapters_app.command(
    epilog=_example("loradock adapters shadow support 3 0.1", "loradock adapters shadow support 3 0  # ends it")
)
def shadow(
    name: Name, version: Version, weight: Weight, url: Url = _URL, key: Key = None, as_json: Json = False
) -> None:
    """Have a version answer a share of an adapter's requests too, unseen, for comparison."""
    with _client(url, key) as client:
        answer = client.shadow(name, _version(version), weight)
    _print(answer, as_json, lambda told: _shared(told, "shadow", "also answers, unseen,"))


@adapters_app.command(epilog=_example("loradock adapters pin support", "loradock adapters pin support 3"))
def pin(
    name: Name,
    version: Annotated[str | None, typer.Argument(metavar="[VERSION]", help="3 or v3; else whichever is live.")] = None,
    url: Url = _URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Keep an adapter in the engine, whoever else comes."""
    with _client(url, key) as client:
        answer = client.pin(name, _version(version) if version is not None else None)
    _print(answer, as_json, lambda told: f"{name} is pinned")


@adapters_app.command(epilog=_example("loradock adapters unpin support"))
def unpin(name: Name, url: Url = _URL, key: Key = None, as_json: Json = False) -> None:
    """Let an adapter leave the engine again when others need the room."""
    with _client(url, key) as client:
        answer = client.unpin(name)
    _print(answer, as_json, lambda told: f"{name} is pinned no more")


@adapters_app.command(epilog=_example("loradock adapters rm support@v2", "loradock adapters rm support --force"))
def rm(
    target: Annotated[str, typer.Argument(metavar="NAME[@VERSION]", help="All versions, or that one.")],
    force: Annotated[bool, typer.Option("--force", help="Also what is live.")] = False,
    url: Url = _URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Remove an adapter, or one version of it."""
    with _client(url, key) as client:
        name, at, version = target.partition("@")
        answer = client.remove(name, _version(version) if at else None, force)
    _print(answer, as_json, lambda told: f"{target} is removed")


@contextmanager
def _client(url: str, key: str | None) -> Iterator[AdapterClient]:
    """A client whose errors become a sentence and an exit code."""
    from serve.client import AdapterClient, Unreachable

    try:
        with AdapterClient(url, key) as client:
            yield client
    except LoradockError as error:
        typer.echo(f"loradock adapters: {error.message}", err=True)
        for problem in getattr(error, "problems", []):
            typer.echo(f"  - {problem}", err=True)
        raise typer.Exit(2 if isinstance(error, ConfigError) else 3 if isinstance(error, Unreachable) else 1) from error


@contextmanager
def _bar(name: str) -> Iterator[Callable[[int, int], None] | None]:
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
            said = "the server checks it" if sent == total else f"pushing {escape(name)}"
            progress.update(task, completed=sent, total=total, description=said)

        yield update


def _print(answer: dict[str, Any], as_json: bool, say: Callable[[dict[str, Any]], str]) -> None:
    typer.echo(json.dumps(answer, indent=2) if as_json else say(answer))


def _pushed(answer: dict[str, Any]) -> str:
    name = f"{answer.get('name')} {_v(answer.get('version'))} ({answer.get('id')})"
    live = _live(answer)
    if live is True or live == answer.get("version"):
        return f"{name} is live"
    return (
        f"{name} is stored; make it live with: loradock adapters promote {answer.get('name')} {answer.get('version')}"
    )


def _listed(answer: dict[str, Any]) -> str:
    rows = [("NAME", "LIVE", "VERSIONS")]
    for adapter in answer["data"]:
        versions = adapter.get("versions")
        count = len(versions) if isinstance(versions, list) else versions
        rows.append((str(adapter.get("name")), _v(_live(adapter)), str(count if count is not None else "-")))
    return _table(rows) if len(rows) > 1 else "no adapters yet; begin with: loradock adapters push NAME PATH"


def _shown(answer: dict[str, Any]) -> str:
    live = _live(answer)
    rows = [("VERSION", "LIVE", "ID", "CREATED")]
    for version in answer.get("versions", []):
        number = version.get("version")
        is_live = number == live or version.get("live") is True
        created = str(version.get("created_at") or version.get("created") or "-")
        rows.append((_v(number), "*" if is_live else "", str(version.get("id", "-")), created))
    lines = [str(answer.get("name")), _table(rows)]
    lines += [
        _shared(answer, kind, does)
        for kind, does in (("canary", "answers"), ("shadow", "also answers, unseen,"))
        if answer.get(kind)
    ]
    lines += [
        f"{_v(version.get('version'))} is pinned" for version in answer.get("versions", []) if version.get("pinned")
    ]
    if answer.get("history"):
        lines += ["history:", *(f"  {_event(event)}" for event in answer["history"])]
    return "\n".join(lines)


def _shared(answer: dict[str, Any], kind: str, does: str) -> str:
    share = answer.get(kind)
    if not share:
        return f"{answer.get('name')} has no {kind} any more"
    return f"{answer.get('name')} {_v(share['version'])} {does} {share['weight']:.4g} of the requests"


def _event(event: Any) -> str:
    return "  ".join(f"{key}={value}" for key, value in event.items()) if isinstance(event, dict) else str(event)


def _live(answer: dict[str, Any]) -> Any:
    live = answer.get("live")
    return live.get("version") if isinstance(live, dict) else live


def _v(version: Any) -> str:
    return f"v{version}" if isinstance(version, int) and not isinstance(version, bool) else str(version or "-")


def _version(text: str) -> int:
    number = text.removeprefix("v")
    if not number.isdecimal() or int(number) < 1:
        raise ConfigError(f"a version is a number from 1 on, for instance 3 or v3; not {text!r}")
    return int(number)


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
