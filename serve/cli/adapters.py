"""`loradock adapters`: the adapter API from a terminal or a script.

Exit codes: 0 done, 1 the server refused, 2 the command is wrong, 3 no server answered.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from serve.cli import adapter_pages
from serve.cli.adapter_pages import live_version, numbered
from serve.cli.baseline import PATIENCE
from serve.cli.replay_page import replayed
from serve.cli.terminal import URL, Json, Key, Url, connected, example, say
from serve.errors import ConfigError, LoradockError

if TYPE_CHECKING:
    from serve.client.adapter_client import AdapterClient

adapters_app = typer.Typer(
    name="adapters",
    help="Push, list, promote, try out, pin and remove adapters on a running server.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="The adapter's public name.")]
Target = Annotated[
    str, typer.Argument(metavar="NAME[@VERSION]", help="The live version, or that one: v3, an alias, or a digest.")
]
Version = Annotated[str, typer.Argument(metavar="VERSION", help="3 or v3.")]
Why = Annotated[str, typer.Option("--why", metavar="TEXT", help="A reason, for the adapter's history.")]
Expect = Annotated[str | None, typer.Option("--expect", metavar="VERSION", help="Only if this version is live now.")]
Weight = Annotated[float, typer.Argument(metavar="WEIGHT", min=0, max=1, help="A share from 0 to 1; 0 ends it.")]


@adapters_app.command(
    epilog=example(
        "loradock adapters push support ./support-lora",
        "loradock adapters push support lora.tar.gz",
        "loradock adapters push support hf://our-team/support-lora@main",
        "loradock adapters push support ./support-lora --dry-run",
    )
)
def push(
    name: Name,
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="A PEFT folder, a .zip, .tar.gz or .tar.zst of one, "
            "or an address that the server fetches: hf://, s3://, ...",
        ),
    ],
    promote: Annotated[bool, typer.Option("--promote/--no-promote", help="Make it the live version.")] = True,
    shared: Annotated[
        bool | None,
        typer.Option(
            "--shared/--private", help="Let other tenants ask it, or only your own (the default for a new adapter)."
        ),
    ] = None,
    why: Why = "",
    probe_min_effect: Annotated[
        float | None,
        typer.Option(min=0, help="Take a version that changes less than the server's limit, in nats on average."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Have the server make every check, and keep nothing.")
    ] = False,
    url: Url = URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Upload an adapter; the same bytes twice are one version."""
    options: dict[str, Any] = {"promote": promote, "shared": shared, "why": why, "probe_min_effect": probe_min_effect}
    options |= {"dry_run": dry_run}
    with connected("adapters", url, key) as client, _bar(name) as progress:
        if "://" in path:
            answer = client.push_source(name, path, **options)
        else:
            answer = client.push(name, path, **options, progress=progress)
    say(answer, as_json, adapter_pages.pushed)


@adapters_app.command(
    epilog=example("loradock adapters pull support ./support-lora", "loradock adapters pull support@v2 ./support-v2")
)
def pull(
    target: Target,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder.")],
    url: Url = URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Write a version's files to a new folder, with where it comes from; another server takes them by `push`."""
    from serve.client.adapter_folder import pull as write

    with connected("adapters", url, key) as client:
        answer = write(client, target, folder)
    say(answer, as_json, lambda _: f"{folder}: {answer['name']} v{answer['version']}, {answer['digest'][:12]}")


@adapters_app.command(
    epilog=example(
        "HF_TOKEN=... loradock adapters publish support@v2 hf://our-team/support-lora",
        "HF_TOKEN=... loradock adapters publish ./support-lora hf://our-team/support-lora@next --private",
    )
)
def publish(
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="NAME[@VERSION] of the server, or a PEFT folder here.")
    ],
    to: Annotated[str, typer.Argument(metavar="HF", help="hf://ORG/REPO, or hf://ORG/REPO@BRANCH/FOLDER.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    message: Annotated[str, typer.Option("--message", metavar="TEXT", help="Of the commit.")] = "",
    url: Url = URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Commit an adapter to a repository of a hub, from here, with the token in HF_TOKEN."""
    from serve.client.adapter_folder import pulled
    from serve.client.hub_repository import check_destination
    from serve.client.hub_repository import publish as commit

    with connected("adapters", url, key) as client:
        check_destination(to)
        if Path(target).is_dir():
            answer = commit(Path(target), to, private=private, message=message)
        else:
            with pulled(client, target) as (folder, version):
                said = message or f"{version['name']} v{version['version']}"
                answer = commit(folder, to, private=private, message=said)
    say(answer, as_json, lambda _: f"{to}: commit {answer['commit'][:12]} of {', '.join(answer['files'])}")


@adapters_app.command("list", epilog=example("loradock adapters list --json | jq -r '.data[].name'"))
def list_(url: Url = URL, key: Key = None, as_json: Json = False) -> None:
    """List the adapters: the live version of each, its canary, shadow and pin, its rank, size and age."""
    with connected("adapters", url, key) as client:
        adapters = client.list()
    say({"object": "list", "data": adapters}, as_json, adapter_pages.listed)


@adapters_app.command(epilog=example("loradock adapters show support"))
def show(name: Name, url: Url = URL, key: Key = None, as_json: Json = False) -> None:
    """Show an adapter: its versions, which is live, how its canary does, and its history."""
    with connected("adapters", url, key) as client:
        answer = client.show(name)
        analysis = _analysis(client, name) if answer.get("canary") and not as_json else None
    say(answer, as_json, lambda answer: adapter_pages.shown(answer, analysis))


@adapters_app.command(epilog=example("loradock adapters promote support 3", "loradock adapters promote support v3"))
def promote(
    name: Name,
    version: Version,
    expect: Expect = None,
    at_once: Annotated[
        bool, typer.Option("--at-once", help="Skip the canary that the adapter's policy asks for.")
    ] = False,
    why: Why = "",
    url: Url = URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Make a version live; the adapter's policy may give it a share of the traffic first."""
    with connected("adapters", url, key) as client:
        expected = _version(expect) if expect is not None else None
        answer = client.promote(name, _version(version), expected, at_once=at_once, why=why)
    say(answer, as_json, lambda body: _promoted(body, f"{name} v{_version(version)}"))


def _promoted(answer: dict[str, Any], which: str) -> str:
    if answer.get("live") is False:
        return f"{which} is a canary now, as this adapter's policy says; with --at-once it would be live"
    return f"{which} is live"


@adapters_app.command(epilog=example("loradock adapters rollback support"))
def rollback(
    name: Name, expect: Expect = None, why: Why = "", url: Url = URL, key: Key = None, as_json: Json = False
) -> None:
    """Make the previous version live again."""
    with connected("adapters", url, key) as client:
        answer = client.rollback(name, _version(expect) if expect is not None else None, why=why)
    say(answer, as_json, lambda body: f"{name} {numbered(live_version(body))} is live again")


@adapters_app.command(
    epilog=example("loradock adapters canary support 3 0.1", "loradock adapters canary support 3 0  # ends it")
)
def canary(
    name: Name,
    version: Version,
    weight: Weight,
    why: Why = "",
    url: Url = URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Send a share of an adapter's requests to a version that is not live."""
    with connected("adapters", url, key) as client:
        answer = client.canary(name, _version(version), weight, why=why)
    say(answer, as_json, lambda body: adapter_pages.shared(body, "canary", "answers"))


@adapters_app.command(
    epilog=example("loradock adapters shadow support 3 0.1", "loradock adapters shadow support 3 0  # ends it")
)
def shadow(
    name: Name,
    version: Version,
    weight: Weight,
    why: Why = "",
    url: Url = URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Let a version answer a share of an adapter's requests too, for comparison; clients do not see its answers."""
    with connected("adapters", url, key) as client:
        answer = client.shadow(name, _version(version), weight, why=why)
    say(answer, as_json, lambda body: adapter_pages.shared(body, "shadow", "also answers, unseen,"))


@adapters_app.command(epilog=example("loradock adapters pin support", "loradock adapters pin support 3"))
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
        answer = client.pin(name, _version(version) if version is not None else None)
    say(answer, as_json, adapter_pages.pinned)


@adapters_app.command(epilog=example("loradock adapters unpin support"))
def unpin(name: Name, url: Url = URL, key: Key = None, as_json: Json = False) -> None:
    """End the pin: the engine may drop the adapter when others need the room."""
    with connected("adapters", url, key) as client:
        answer = client.unpin(name)
    say(answer, as_json, lambda _: f"{name} is pinned no more")


@adapters_app.command(epilog=example("loradock adapters alias support stable 3  # then ask support@stable"))
def alias(
    name: Name,
    alias: Annotated[str, typer.Argument(metavar="ALIAS", help="The name behind the @.")],
    version: Version,
    why: Why = "",
    url: Url = URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Point NAME@ALIAS at a version; it stays there until it is moved, whatever is promoted."""
    with connected("adapters", url, key) as client:
        answer = client.alias(name, alias, _version(version), why=why)
    say(answer, as_json, lambda _: f"{name}@{alias} is v{_version(version)}")


@adapters_app.command(epilog=example("loradock adapters unalias support stable"))
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


@adapters_app.command(
    epilog=example('loradock adapters tag support 3 "run 17"', "loradock adapters tag support 3  # none any more")
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
    """Write tags on a version, for people: the server reads nothing in them."""
    with connected("adapters", url, key) as client:
        answer = client.tag(name, _version(version), tags or [], why=why)
    say(answer, as_json, lambda body: f"{name} v{_version(version)}: {', '.join(body.get('tags', [])) or 'no tags'}")


@adapters_app.command(
    epilog=example("loradock adapters rename support helpdesk", "loradock adapters rm support  # the old name, later")
)
def rename(
    name: Name,
    to: Annotated[str, typer.Argument(metavar="NEW", help="The name that it has from now on.")],
    why: Why = "",
    url: Url = URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Give an adapter another name; requests for the old one go on being answered until it is removed."""
    with connected("adapters", url, key) as client:
        answer = client.rename(name, to, why=why)
    say(answer, as_json, lambda body: f"{name} is {body.get('name')} now; the old name leads there until `rm {name}`")


@adapters_app.command(epilog=example("loradock adapters share support"))
def share(name: Name, url: Url = URL, key: Key = None, as_json: Json = False) -> None:
    """Let other tenants ask an adapter, as TENANT/NAME."""
    with connected("adapters", url, key) as client:
        answer = client.share(name, True)
    say(answer, as_json, lambda _: f"{name} is shared")


@adapters_app.command(epilog=example("loradock adapters unshare support"))
def unshare(name: Name, url: Url = URL, key: Key = None, as_json: Json = False) -> None:
    """Let only the adapter's own tenant ask it again."""
    with connected("adapters", url, key) as client:
        answer = client.share(name, False)
    say(answer, as_json, lambda _: f"{name} is private")


@adapters_app.command(epilog=example("loradock adapters rm support@v2", "loradock adapters rm support --force"))
def rm(
    target: Annotated[str, typer.Argument(metavar="NAME[@VERSION]", help="All versions, or that one.")],
    force: Annotated[bool, typer.Option("--force", help="Also what is live.")] = False,
    why: Why = "",
    url: Url = URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Remove an adapter, or one version of it."""
    with connected("adapters", url, key) as client:
        name, at, version = target.partition("@")
        answer = client.remove(name, _version(version) if at else None, force, why=why)
    say(answer, as_json, lambda body: adapter_pages.removed(body, target))


@adapters_app.command(
    epilog=example("loradock adapters replay support@v4", "loradock adapters replay support@v4 --against live --json")
)
def replay(
    target: Annotated[str, typer.Argument(metavar="NAME@VERSION", help="The version that is to answer, as tone@v4.")],
    requests: Annotated[int, typer.Option("--requests", min=1, max=1000, help="So many captured requests.")] = 50,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, max=4096, help="Longest answer.")] = 256,
    against: Annotated[
        Literal["kept", "live"], typer.Option("--against", help="The kept answers, or the live version's.")
    ] = "kept",
    examples: Annotated[int, typer.Option("--examples", min=0, max=100, help="So many, side by side.")] = 3,
    url: Url = URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Have a version answer what was asked before, in the gaps of traffic, and compare what it says."""
    with connected("adapters", url, key, timeout=PATIENCE) as client:
        name, _, version = target.partition("@")
        answer = client.replay(name, _version(version), requests, max_tokens, against, examples)
    say(answer, as_json, replayed)


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
            description = "the server checks it" if sent == total else f"pushing {escape(name)}"
            progress.update(task, completed=sent, total=total, description=description)

        yield update


def _analysis(client: AdapterClient, name: str) -> dict[str, Any] | None:
    """How the canary does; None where the server does not say: the rest is shown all the same."""
    try:
        return client.drift(name).get("canary")
    except LoradockError:
        return None


def _version(text: str) -> int:
    number = text.removeprefix("v")
    if not number.isdecimal() or int(number) < 1:
        raise ConfigError(f"a version is a number from 1 on, for instance 3 or v3; not {text!r}")
    return int(number)
