"""`loradock adapters`: the adapter API from a terminal or a script.

Exit codes: 0 done, 1 the server refused, 2 the command is wrong, 3 no server answered.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from serve.cli.terminal import URL, Json, Key, Url, connected, example, say, table
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
Version = Annotated[str, typer.Argument(metavar="VERSION", help="3 or v3.")]
Why = Annotated[str, typer.Option("--why", metavar="TEXT", help="A reason, for the adapter's history.")]
Expect = Annotated[str | None, typer.Option("--expect", metavar="VERSION", help="Only if this version is live now.")]
Weight = Annotated[float, typer.Argument(metavar="WEIGHT", min=0, max=1, help="A share from 0 to 1; 0 ends it.")]


@adapters_app.command(
    epilog=example(
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
    url: Url = URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Upload an adapter; the same bytes twice are one version."""
    options: dict[str, Any] = {"promote": promote, "shared": shared, "why": why, "probe_min_effect": probe_min_effect}
    with connected("adapters", url, key) as client, _bar(name) as progress:
        if "://" in path:
            answer = client.push_source(name, path, **options)
        else:
            answer = client.push(name, path, **options, progress=progress)
    say(answer, as_json, _pushed)


@adapters_app.command("list", epilog=example("loradock adapters list --json | jq -r '.data[].name'"))
def list_(url: Url = URL, key: Key = None, as_json: Json = False) -> None:
    """List the adapters, with the live version of each."""
    with connected("adapters", url, key) as client:
        adapters = client.list()
    say({"object": "list", "data": adapters}, as_json, _listed)


@adapters_app.command(epilog=example("loradock adapters show support"))
def show(name: Name, url: Url = URL, key: Key = None, as_json: Json = False) -> None:
    """Show the versions of an adapter, which is live, and its history."""
    with connected("adapters", url, key) as client:
        answer = client.show(name)
        analysis = _analysis(client, name) if answer.get("canary") and not as_json else None
    say(answer, as_json, lambda answer: _shown(answer, analysis))


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
    say(answer, as_json, lambda body: f"{name} {_v(_live(body))} is live again")


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
    say(answer, as_json, lambda body: _shared(body, "canary", "answers"))


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
    say(answer, as_json, lambda body: _shared(body, "shadow", "also answers, unseen,"))


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
    say(answer, as_json, lambda _: f"{name} is pinned")


@adapters_app.command(epilog=example("loradock adapters unpin support"))
def unpin(name: Name, url: Url = URL, key: Key = None, as_json: Json = False) -> None:
    """End the pin: the engine may drop the adapter when others need the room."""
    with connected("adapters", url, key) as client:
        answer = client.unpin(name)
    say(answer, as_json, lambda _: f"{name} is pinned no more")


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
    say(answer, as_json, lambda _: f"{target} is removed")


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


def _pushed(answer: dict[str, Any]) -> str:
    name = f"{answer.get('name')} {_v(answer.get('version'))} ({answer.get('id')})"
    warning = f"\nwarning: {text}" if (text := (answer.get("checks") or {}).get("warning")) else ""
    if _live(answer) == answer.get("version"):
        return f"{name} is live{warning}"
    promote = f"loradock adapters promote {answer.get('name')} {answer.get('version')}"
    return f"{name} is stored; make it live with: {promote}{warning}"


def _listed(answer: dict[str, Any]) -> str:
    rows = [("NAME", "LIVE", "VERSIONS")]
    for adapter in answer["data"]:
        versions = adapter.get("versions")
        count = len(versions) if isinstance(versions, list) else versions
        rows.append((str(adapter.get("name")), _v(_live(adapter)), str(count if count is not None else "-")))
    return table(rows) if len(rows) > 1 else "no adapters yet; begin with: loradock adapters push NAME PATH"


def _analysis(client: AdapterClient, name: str) -> dict[str, Any] | None:
    """How the canary does; None where the server does not say: the rest is shown all the same."""
    try:
        return client.drift(name).get("canary")
    except LoradockError:
        return None


def _shown(answer: dict[str, Any], analysis: dict[str, Any] | None = None) -> str:
    live = _live(answer)
    rows = [("VERSION", "LIVE", "ID", "CREATED")]
    for version in answer.get("versions", []):
        number = version.get("version")
        rows.append(
            (_v(number), "*" if number == live else "", str(version.get("id", "-")), _when(version.get("created")))
        )
    lines = [str(answer.get("name")), table(rows)]
    lines += [
        _shared(answer, kind, does)
        for kind, does in (("canary", "answers"), ("shadow", "also answers, unseen,"))
        if answer.get(kind)
    ]
    if analysis:
        lines += _compared(analysis)
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


def _compared(analysis: dict[str, Any]) -> list[str]:
    """How the canary does, and what it takes until it has proved itself."""
    requests, askers = analysis.get("requests", 0), analysis.get("askers", 0)
    line = f"{_v(analysis['canary'])} against {_v(analysis['live'])}: {analysis['verdict']} after {requests} requests"
    line += f" of {askers} askers"
    if analysis.get("dealt_by") == "request":
        line += ", dealt by request: few askers"
    rows = [("CHECK", "EFFECT", "MORE REQUESTS UNTIL PROVED")]
    for check in analysis.get("checks", []):
        if check.get("worse"):
            rows.append((check["check"], f"{check['effect']}", "worse"))
        elif check.get("requests_to_proof"):
            rows.append((check["check"], f"{check['effect']}", _expected(check["requests_to_proof"])))
    if len(rows) == 1:
        return [line, "  too early to say how many requests it takes until it is proved"]
    return [line, *(f"  {row}" for row in table(rows).splitlines())]


def _expected(requests: dict[str, int | None]) -> str:
    if requests["high"] == 0:
        return "proved"
    low, expected, high = (requests[bound] for bound in ("low", "expected", "high"))
    if low is None:
        return "not in sight"
    return f"{'not in sight' if expected is None else expected} ({low} to {'no end' if high is None else high})"


def _event(event: Any) -> str:
    if not isinstance(event, dict):
        return str(event)
    fields = {key: _when(value) if key == "when" else value for key, value in event.items()}
    return "  ".join(f"{key}={value}" for key, value in fields.items() if value not in (None, ""))


def _live(answer: dict[str, Any]) -> int | None:
    """The live version: an adapter names its number, a version says whether it is the one."""
    live = answer.get("live")
    if isinstance(live, bool):
        return answer.get("version") if live else None
    return live


def _when(moment: Any) -> str:
    """Seconds since 1970 as a local time."""
    if not isinstance(moment, int | float):
        return str(moment or "-")
    return datetime.fromtimestamp(moment).astimezone().isoformat(" ", timespec="seconds")


def _v(version: Any) -> str:
    return f"v{version}" if isinstance(version, int) and not isinstance(version, bool) else str(version or "-")


def _version(text: str) -> int:
    number = text.removeprefix("v")
    if not number.isdecimal() or int(number) < 1:
        raise ConfigError(f"a version is a number from 1 on, for instance 3 or v3; not {text!r}")
    return int(number)
