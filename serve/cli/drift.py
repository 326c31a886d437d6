"""`loradock drift`: what moved, and what to do about it.

Exit codes: 0 done, 1 the server refused, 2 the command is wrong, 3 no server answered.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from serve.cli.arguments import Commands, VersionOption, name_and_version
from serve.cli.terminal import URL, Json, Key, Url, connected, example, say, table, write_answer

drift_app = typer.Typer(
    name="drift",
    help="See what changed in traffic and answers, and act on it.",
    no_args_is_help=True,
    rich_markup_mode=None,
    cls=Commands,
)

Name = Annotated[str, typer.Argument(metavar="NAME[@VERSION]", help="The adapter, or a base model.")]


@drift_app.command(epilog=example("loradock drift show", "loradock drift show tone", "loradock drift show tone@v2"))
def show(
    name: Annotated[
        str, typer.Argument(metavar="[NAME[@VERSION]]", help="The adapter, or a base model (default: every one).")
    ] = "",
    url: Url = URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Say what moved, since when, and how strongly.

    Of each watched version; without NAME a line for each.
    """
    with connected("drift", url, key) as client:
        if not name:
            say(client.drift_everywhere(), as_json, _everywhere)
            return
        name, version = name_and_version(name, None)
        answer = client.drift(name)
        if version is not None:
            answer |= {"versions": [each for each in answer["versions"] if each["version"] == f"v{version}"]}
    say(answer, as_json, _shown)


@drift_app.command("list", hidden=True)
def list_(url: Url = URL, key: Key = None, as_json: Json = False) -> None:
    """As `show` without a name."""
    show("", url, key, as_json)


@drift_app.command(epilog=example("loradock drift acknowledge tone --version 3"))
def acknowledge(
    name: Name, version: VersionOption = None, url: Url = URL, key: Key = None, as_json: Json = False
) -> None:
    """Close a version's alarms.

    The evidence begins again, the reference stays.
    """
    with connected("drift", url, key) as client:
        answer = client.acknowledge_drift(*name_and_version(name, version))
    say(answer, as_json, _shown)


@drift_app.command(epilog=example('loradock drift accept tone --version 3 --signals prompt --note "the German shop"'))
def accept(
    name: Name,
    version: VersionOption = None,
    signals: Annotated[str, typer.Option("--signals", help="prompt, output or both.")] = "both",
    note: Annotated[str, typer.Option("--note", help="Why, for the history.")] = "",
    url: Url = URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Make the traffic since the change the new reference.

    What is missing of it is gathered.
    """
    with connected("drift", url, key) as client:
        answer = client.accept_drift(*name_and_version(name, version), signals, note)
    say(answer, as_json, _shown)


@drift_app.command(epilog=example("loradock drift requests tone moved.jsonl --version 3"))
def requests(
    name: Name,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to: .jsonl, or .parquet.")],
    version: VersionOption = None,
    url: Url = URL,
    key: Key = None,
) -> None:
    """Save the requests since the change.

    The most moved first; the server must run with `capture`.
    """
    with connected("drift", url, key) as client:
        name, version = name_and_version(name, version)
        write_answer(file, client.moved_requests(name, version, "parquet" if file.suffix == ".parquet" else "jsonl"))
    typer.echo(f"{file} holds the moved requests of {name}")


def _shown(answer: dict[str, Any]) -> str:
    lines = [line for version in answer["versions"] for line in _version(answer["name"], version)]
    return "\n".join(lines) or f"nothing is known of the traffic of {answer['name']} yet"


def _everywhere(answer: dict[str, Any]) -> str:
    rows: list[tuple[str, ...]] = [("NAME", "VERSION", "STATE")]
    for row in answer["data"]:
        for version in row["versions"]:
            drifted = ", ".join(version["drifted"])
            rows.append((row["name"], version["version"], f"moved: {drifted}" if drifted else "no alarm"))
    return table(rows) if len(rows) > 1 else "nothing is watched yet: no adapter has had a request"


def _version(name: str, version: dict[str, Any]) -> list[str]:
    alarms = {kind: moved.get("text", "an alarm") for kind, moved in version["alarms"].items()}
    states = {kind: alarms.get(kind) or _quiet(signal) for kind, signal in version["signals"].items()}
    return [f"{name}@{version['version']} {kind}: {text}" for kind, text in (states | alarms).items()]


def _quiet(signal: dict[str, Any]) -> str:
    if signal["phase"] == "gathering":
        return f"gathers its reference, {signal['reference_requests']} of {signal['reference_needed']} requests"
    evidence = f"evidence {signal['log_evidence']:.1f} of {signal['log_threshold']:.1f}"
    return f"no alarm in {signal['samples']} requests ({evidence})"
