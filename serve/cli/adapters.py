"""`loradock adapters`: the adapter API from a terminal or a script.

Exit codes: 0 done, 1 the server refused, 2 the command is wrong, 3 no server answered.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from serve.cli import adapter_names, adapter_pages
from serve.cli.adapter_pages import live_version, numbered
from serve.cli.arguments import Commands, Name, Target, Version, VersionedCommand, Why, parse_share, version_number
from serve.cli.baseline import PATIENCE
from serve.cli.replay_page import replayed
from serve.cli.terminal import URL, Json, Key, Url, connected, counted, example, say, told, upload_bar
from serve.errors import ConfigError, LoradockError, NotFound

if TYPE_CHECKING:
    from serve.client.adapter_client import AdapterClient

adapters_app = typer.Typer(
    name="adapters",
    help="Push, try, promote, roll back and remove adapters.",
    no_args_is_help=True,
    rich_markup_mode=None,
    cls=Commands,
)

# How help groups the commands.
TRY = "Try a version"

Expect = Annotated[str | None, typer.Option("--expect", metavar="VERSION", help="Only if this version is live now.")]
Weight = Annotated[
    float, typer.Argument(metavar="SHARE", parser=parse_share, help="Of the requests, as 10% or 0.1; 0 ends it.")
]


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
            help="A PEFT folder, a .zip, .tar.gz or .tar.zst of one, an adapter's .gguf, "
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
    conversion_error: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="What may be left out of a LoHa, LoKr or VeRA that is made a LoRA."),
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
    options |= {"conversion_error": conversion_error, "dry_run": dry_run}
    with connected("adapters", url, key) as client, upload_bar(name) as progress:
        if "://" in path:
            answer = client.push_source(name, path, **options)
        else:
            answer = client.push(name, path, **options, progress=progress)
    say(answer, as_json, adapter_pages.pushed)


@adapters_app.command(
    epilog=example(
        "loradock adapters mix desk tone:0.7 legal:0.3",
        "loradock adapters mix desk tone@v2 legal:-0.5 --no-promote",
    )
)
def mix(
    name: Name,
    parts: Annotated[list[str], typer.Argument(metavar="NAME[:WEIGHT]...", help="Adapters, and how much of each.")],
    promote: Annotated[bool, typer.Option("--promote/--no-promote", help="Make it the live version.")] = True,
    method: Annotated[
        Literal["cat", "ties", "dare_linear", "dare_ties"],
        typer.Option(help="cat is the exact sum; the others prune each adapter first, and need a larger rank."),
    ] = "cat",
    density: Annotated[float, typer.Option(min=0, max=1, help="The part of each that pruning leaves.")] = 0.5,
    why: Why = "",
    url: Url = URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Keep a weighted sum of adapters as a version.

    Without keeping it: ask for the model `tone:0.7+legal:0.3`.
    """
    from serve.client.mixture_client import MixtureClient

    with told("adapters"), MixtureClient(url, key) as client:
        options: dict[str, str | float] = {} if method == "cat" else {"method": method, "density": density}
        answer = client.mix(name, parts, promote=promote, why=why, **options)
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
    """Write a version's files to a new folder.

    With where it comes from; another server takes the folder by `push`.
    """
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
    """Commit an adapter to a repository of a hub.

    From here, with the token in HF_TOKEN.
    """
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
    """List the adapters with their live versions.

    And the canary, shadow and pin of each, its rank, size and age.
    """
    with connected("adapters", url, key) as client:
        adapters = client.list()
    say({"object": "list", "data": adapters}, as_json, adapter_pages.listed)


@adapters_app.command(epilog=example("loradock adapters show support"))
def show(target: Target, url: Url = URL, key: Key = None, as_json: Json = False) -> None:
    """Show an adapter's versions, canary and history."""
    name, at, version = target.partition("@")
    with connected("adapters", url, key) as client:
        answer = client.show(name)
        if at:
            answer = adapter_pages.only(answer, version)
        analysis = _analysis(client, name) if answer.get("canary") and not as_json else None
    say(answer, as_json, lambda answer: adapter_pages.shown(answer, analysis))


@adapters_app.command(
    cls=VersionedCommand,
    epilog=example("loradock adapters promote support@v3", "loradock adapters promote support@v3 --expect 2"),
)
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
    """Make a version live.

    The adapter's policy may give it a share of the traffic first.
    """
    with connected("adapters", url, key) as client:
        expected = version_number(expect) if expect is not None else None
        answer = client.promote(name, version_number(version), expected, at_once=at_once, why=why)
    say(answer, as_json, lambda body: _promoted(body, f"{name}@v{version_number(version)}"))


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
        answer = client.rollback(name, version_number(expect) if expect is not None else None, why=why)
    say(answer, as_json, lambda body: f"{name}@{numbered(live_version(body))} is live again")


@adapters_app.command(
    cls=VersionedCommand,
    rich_help_panel=TRY,
    epilog=example("loradock adapters canary support@v3 10%", "loradock adapters canary support@v3 0  # ends it"),
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
    """Give a version a share of the adapter's requests.

    The version is not live yet; how it compares is in `loradock adapters show`.
    """
    with connected("adapters", url, key) as client:
        answer = client.canary(name, version_number(version), weight, why=why)
    say(answer, as_json, lambda body: adapter_pages.shared(body, "canary", "answers"))


@adapters_app.command(
    cls=VersionedCommand,
    rich_help_panel=TRY,
    epilog=example("loradock adapters shadow support@v3 10%", "loradock adapters shadow support@v3 0  # ends it"),
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
    """Let a version answer too, unseen, for comparison.

    A share of the adapter's requests; clients do not see its answers.
    """
    with connected("adapters", url, key) as client:
        answer = client.shadow(name, version_number(version), weight, why=why)
    say(answer, as_json, lambda body: adapter_pages.shared(body, "shadow", "also answers, unseen,"))


@adapters_app.command(epilog=example("loradock adapters rm support@v2", "loradock adapters rm support --yes"))
def rm(
    target: Annotated[str, typer.Argument(metavar="NAME[@VERSION]", help="All versions, or that one.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask, where the adapter is live.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Also the live version, and what an alias names.")] = False,
    why: Why = "",
    url: Url = URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Remove an adapter, or a version; it asks before a live one."""
    with connected("adapters", url, key) as client:
        name, at, text = target.partition("@")
        version = version_number(text) if at else None
        if not (yes or force):
            _confirm_removal(client, name, version)
        answer = client.remove(name, version, force, why=why)
    say(answer, as_json, lambda body: adapter_pages.removed(body, target))


@adapters_app.command(
    rich_help_panel=TRY,
    epilog=example("loradock adapters replay support@v4", "loradock adapters replay support@v4 --against live --json"),
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
    """Have a version answer captured requests, and compare.

    In the gaps of traffic, against what was answered before or the live version.
    """
    with connected("adapters", url, key, timeout=PATIENCE) as client:
        name, _, version = target.partition("@")
        answer = client.replay(name, version_number(version), requests, max_tokens, against, examples)
    say(answer, as_json, replayed)


@adapters_app.command(
    cls=VersionedCommand,
    rich_help_panel=TRY,
    epilog=example(
        "loradock adapters validate support@v3", "loradock adapters validate support@v3 --train train.jsonl"
    ),
)
def validate(
    name: Name,
    version: Version,
    train: Annotated[
        Path | None, typer.Option("--train", help="The examples that it was trained on: which does it say again?")
    ] = None,
    held_out: Annotated[Path | None, typer.Option("--validation", help="Examples that it was not trained on.")] = None,
    url: Url = URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Measure what a version did to its base.

    What it forgot, whether it refuses as before, and with examples what it leaks of them. Exit code 1 unless it passed.
    """
    from serve.client.fine_tuning_client import FineTuningClient

    number = version_number(version)
    given = {"training_file": train, "validation_file": held_out}
    with told("adapters"), FineTuningClient(url, key, timeout=PATIENCE) as client:
        files = {param: client.send(file) for param, file in given.items() if file}
        answer = client.validate(name, number, files)
    say(answer, as_json, lambda body: adapter_pages.validated(body, f"{name}@v{number}"))
    if answer["checks"]["validation"]["verdict"] != "passed":
        raise typer.Exit(1)


def _asks() -> bool:
    """Whether somebody can answer a question."""
    return sys.stdin.isatty()


def _confirm_removal(client: AdapterClient, name: str, version: int | None) -> None:
    """Ask before something live is removed; where nobody can answer, ConfigError says how to mean it."""
    try:
        adapter = client.show(name)
    except NotFound:
        return  # an old name alone goes, and what is not there the server refuses in its own words
    live = live_version(adapter)
    if live is None or version is not None:
        return  # the server refuses a single live version without --force
    what = f"{name} is live ({numbered(live)} of {counted(len(adapter.get('versions') or []), 'version')})"
    if not _asks():
        raise ConfigError(f"{what}, and requests for it would fail: give --yes to remove it all the same")
    typer.confirm(f"{what}. Remove it with all its versions?", abort=True, err=True)


def _analysis(client: AdapterClient, name: str) -> dict[str, Any] | None:
    """How the canary does; None where the server does not say: the rest is shown all the same."""
    try:
        return client.drift(name).get("canary")
    except LoradockError:
        return None


adapter_names.register(adapters_app)
