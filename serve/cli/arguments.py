"""What people type: `tone 2`, `tone@v2`, `10%`, `ls`, `logs`.

One place for each form, so that every command takes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from serve.errors import ConfigError

# Other names of the commands of a group, in the order in which they are looked for.
_OTHER_NAMES = {
    "ls": ("list",),
    "logs": ("events",),
    "log": ("events",),
    "get": ("show",),
    "delete": ("rm", "remove", "revoke"),
    "remove": ("rm", "delete", "revoke"),
    "rm": ("remove", "delete", "revoke"),
    "add": ("push", "put", "create"),
}


class Commands(TyperGroup):
    """A group of commands that knows them by other names too: `ls` for `list`, `adapter` for `adapters`."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        other = _OTHER_NAMES.get(cmd_name, ())
        spellings = (cmd_name, *other, f"{cmd_name}s", cmd_name.removesuffix("s"))
        return next((command for name in spellings if (command := super(Commands, self).get_command(ctx, name))), None)


class VersionedCommand(TyperCommand):
    """A command with the arguments NAME and VERSION, which takes NAME@VERSION in the place of both."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        return super().parse_args(ctx, self._separated(args))

    def _separated(self, args: list[str]) -> list[str]:
        places = self._positions(args)
        if not places:
            return args
        arguments = [each.name for each in self.params if each.param_type_name == "argument"]
        name, at, version = args[places[0]].partition("@")
        index = arguments.index("version")
        if not at or not name or not version:
            return args
        # Before the argument that follows VERSION; at the end where none does.
        where = places[index] if index < len(places) else len(args)
        whole = list(args)
        whole.insert(where, version)
        whole[places[0]] = name
        return whole

    def _positions(self, args: Sequence[str]) -> list[int]:
        """Which of `args` are arguments, and neither options nor their values."""
        takes_value = {
            option
            for each in self.params
            if each.param_type_name == "option" and not getattr(each, "is_flag", False)
            for option in each.opts
        }
        places: list[int] = []
        skipped = False
        for place, word in enumerate(args):
            if skipped:
                skipped = False
            elif word == "--":
                return [*places, *range(place + 1, len(args))]
            elif word.startswith("-") and word != "-":
                skipped = word in takes_value
            else:
                places.append(place)
        return places


def version_number(text: str) -> int:
    """The number of a version that is written as 3 or v3."""
    number = text.removeprefix("v")
    if not number.isdecimal() or int(number) < 1:
        raise ConfigError(f"a version is a number from 1 on, for instance 3 or v3; not {text!r}")
    return int(number)


def name_and_version(name: str, version: int | None) -> tuple[str, int | None]:
    """NAME@VERSION apart; a version that --version names as well must be the same."""
    name, at, text = name.partition("@")
    if not at:
        return name, version
    number = version_number(text)
    if version not in (None, number):
        raise ConfigError(f"{name}@{text} and --version {version} are two versions; name one")
    return name, number


def _version_option(text: Any) -> int:
    try:
        return version_number(str(text))
    except ConfigError as error:
        raise typer.BadParameter(error.message) from error


def parse_share(text: Any) -> float:
    """A share of the requests: 10% or 0.1."""
    words = str(text).strip()
    try:
        part = float(words.removesuffix("%")) / (100 if words.endswith("%") else 1)
    except ValueError:
        part = -1.0
    if not 0 <= part <= 1:
        raise typer.BadParameter(f"a share is 0% to 100%, or 0 to 1, as 10% or 0.1; not {words!r}")
    return part


Name = Annotated[str, typer.Argument(metavar="NAME", help="The adapter's public name.")]
Target = Annotated[
    str, typer.Argument(metavar="NAME[@VERSION]", help="The live version, or that one: v3, an alias, or a digest.")
]
Version = Annotated[str, typer.Argument(metavar="VERSION", help="3 or v3; or NAME@v3 in one word.")]
Why = Annotated[str, typer.Option("--why", metavar="TEXT", help="A reason, for the adapter's history.")]
VersionOption = Annotated[
    int | None,
    typer.Option("--version", metavar="N", parser=_version_option, help="Which version (default: the live one)."),
]
