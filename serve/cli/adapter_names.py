"""`loradock adapters alias`, `pin`, `rename` and others: what versions are called, and which stay in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from serve.cli import adapter_pages
from serve.cli.arguments import Name, Version, VersionedCommand, Why, version_number
from serve.cli.terminal import URL, Json, Key, Url, connected, example, say

# How help groups the commands.
PANEL = "Names and memory"
_commands: list[tuple[Callable[..., None], dict[str, Any]]] = []


def register(app: typer.Typer) -> None:
    """Add the commands to `loradock adapters`."""
    for command, options in _commands:
        app.command(rich_help_panel=PANEL, **options)(command)


def _command(**options: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def noted(command: Callable[..., None]) -> Callable[..., None]:
        _commands.append((command, options))
        return command

    return noted


@_command(
    cls=VersionedCommand,
    epilog=example("loradock adapters pin support", "loradock adapters pin support@v3"),
)
def pin(
    name: Name,
    version: Annotated[
        str | None, typer.Argument(metavar="[VERSION]", help="3 or v3 (default: the live version).")
    ] = None,
    url: Url = URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Keep an adapter in the engine's memory, whatever else is asked."""
    with connected("adapters", url, key) as client:
        answer = client.pin(name, version_number(version) if version is not None else None)
    say(answer, as_json, adapter_pages.pinned)


@_command(epilog=example("loradock adapters unpin support"))
def unpin(name: Name, url: Url = URL, key: Key = None, as_json: Json = False) -> None:
    """End the pin.

    The engine may drop the adapter when others need the room.
    """
    with connected("adapters", url, key) as client:
        answer = client.unpin(name)
    say(answer, as_json, lambda _: f"{name} is pinned no more")


@_command(
    cls=VersionedCommand,
    epilog=example("loradock adapters alias support@v3 stable  # then ask support@stable"),
)
def alias(
    name: Name,
    alias: Annotated[str, typer.Argument(metavar="ALIAS", help="The name behind the @.")],
    version: Version,
    why: Why = "",
    url: Url = URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Point NAME@ALIAS at a version.

    It stays there until it is moved, whatever is promoted.
    """
    with connected("adapters", url, key) as client:
        answer = client.alias(name, alias, version_number(version), why=why)
    say(answer, as_json, lambda _: f"{name}@{alias} is v{version_number(version)}")


@_command(epilog=example("loradock adapters unalias support stable"))
def unalias(
    name: Name,
    alias: Annotated[str, typer.Argument(metavar="ALIAS", help="The name behind the @.")],
    why: Why = "",
    url: Url = URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Remove an alias; its version stays."""
    with connected("adapters", url, key) as client:
        answer = client.unalias(name, alias, why=why)
    say(answer, as_json, lambda _: f"{name}@{alias} means nothing any more")


@_command(
    cls=VersionedCommand,
    epilog=example('loradock adapters tag support@v3 "run 17"', "loradock adapters tag support@v3  # none any more"),
)
def tag(
    name: Name,
    version: Version,
    tags: Annotated[list[str] | None, typer.Argument(metavar="[TAG]...", help="In the place of earlier ones.")] = None,
    why: Why = "",
    url: Url = URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Write tags on a version, for people.

    The server reads nothing in them.
    """
    with connected("adapters", url, key) as client:
        answer = client.tag(name, version_number(version), tags or [], why=why)
    say(
        answer,
        as_json,
        lambda body: f"{name}@v{version_number(version)}: {', '.join(body.get('tags', [])) or 'no tags'}",
    )


@_command(
    epilog=example("loradock adapters rename support helpdesk", "loradock adapters rm support  # the old name, later"),
)
def rename(
    name: Name,
    to: Annotated[str, typer.Argument(metavar="NEW", help="The name that it has from now on.")],
    why: Why = "",
    url: Url = URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Give an adapter another name.

    Requests for the old one go on being answered until it is removed.
    """
    with connected("adapters", url, key) as client:
        answer = client.rename(name, to, why=why)
    say(answer, as_json, lambda body: f"{name} is {body.get('name')} now; the old name leads there until `rm {name}`")


@_command(epilog=example("loradock adapters share support"))
def share(name: Name, url: Url = URL, key: Key = None, as_json: Json = False) -> None:
    """Let other tenants ask an adapter, as TENANT/NAME."""
    with connected("adapters", url, key) as client:
        answer = client.share(name, True)
    say(answer, as_json, lambda _: f"{name} is shared")


@_command(epilog=example("loradock adapters unshare support"))
def unshare(name: Name, url: Url = URL, key: Key = None, as_json: Json = False) -> None:
    """Let only the adapter's own tenant ask it again."""
    with connected("adapters", url, key) as client:
        answer = client.share(name, False)
    say(answer, as_json, lambda _: f"{name} is private")
