"""`loradock golden`: prompts with what a good answer is, and how an adapter's versions score on them.

Exit codes: 0 done, 1 the server refused, 2 the command is wrong, 3 no server answered.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from serve.cli.arguments import Commands, VersionOption, name_and_version
from serve.cli.terminal import URL, Json, Key, Url, connected, counted, example, say, table
from serve.errors import ConfigError

# Seconds between two looks while `run` waits.
LOOK_SECONDS = 1.0

golden_app = typer.Typer(
    name="golden",
    help="Say what good answers are, and see how versions score.",
    no_args_is_help=True,
    rich_markup_mode=None,
    cls=Commands,
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="The adapter.")]
Target = Annotated[str, typer.Argument(metavar="NAME[@VERSION]", help="The adapter.")]


@golden_app.command(epilog=example("loradock golden put tone golden.jsonl"))
def put(
    name: Name,
    file: Annotated[
        Path,
        typer.Argument(
            metavar="CASES",
            help='JSON lines, or {"cases": [...]}: a prompt or messages, and one of equals, contains, regex, '
            "json_schema, judge.",
        ),
    ],
    url: Url = URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Keep a golden set for an adapter.

    The live version is asked it, and each version that comes.
    """
    document = read_document(file)
    with connected("golden", url, key) as client:
        answer = client.put_golden(name, document)
    say(
        answer,
        as_json,
        lambda kept: f"{name} has a golden set of {counted(kept['count'], 'case')} ({kept['digest'][:12]})",
    )


@golden_app.command("list", epilog=example("loradock golden list"))
def list_(url: Url = URL, key: Key = None, as_json: Json = False) -> None:
    """List the adapters that have a golden set."""
    with connected("golden", url, key) as client:
        answer = client.golden_sets()
    say(answer, as_json, _listed)


@golden_app.command(epilog=example("loradock golden show tone", "loradock golden show tone@v3 --json"))
def show(name: Target, version: VersionOption = None, url: Url = URL, key: Key = None, as_json: Json = False) -> None:
    """Show the scores of an adapter's versions.

    And each case of one version.
    """
    with connected("golden", url, key) as client:
        answer = client.golden_results(*name_and_version(name, version))
    say(answer, as_json, _results)


@golden_app.command(epilog=example("loradock golden run tone@v3 --wait"))
def run(
    name: Target,
    version: VersionOption = None,
    wait: Annotated[bool, typer.Option("--wait", help="Until every case was asked; then show the results.")] = False,
    url: Url = URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Have a version answer the golden set again.

    In the gaps of traffic.
    """
    with connected("golden", url, key) as client:
        name, version = name_and_version(name, version)
        answer = client.run_golden(name, version)
        if not wait:
            say(answer, as_json, lambda run: f"{name}@v{run['version']} is asked {run['cases']} cases")
            return
        while (results := client.golden_results(name, answer["version"]))["running"]:
            time.sleep(LOOK_SECONDS)
    say(results, as_json, _results)


@golden_app.command(epilog=example("loradock golden remove tone"))
def remove(name: Name, url: Url = URL, key: Key = None, as_json: Json = False) -> None:
    """Remove an adapter's golden set, with all outcomes."""
    with connected("golden", url, key) as client:
        answer = client.remove_golden(name)
    say(answer, as_json, lambda gone: f"{name} has no golden set any more")


def read_document(file: Path) -> dict[str, Any]:
    """A golden set from a file of JSON or JSON lines; ConfigError says what is wrong with it."""
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    try:
        document = json.loads(text)
    except ValueError:
        return {"cases": _lines(file, text)}
    if isinstance(document, dict):
        return document if "cases" in document else {"cases": [document]}
    if not isinstance(document, list):
        raise ConfigError(f'{file} holds neither {{"cases": [...]}}, nor a list of cases, nor a case a line')
    return {"cases": document}


def _lines(file: Path, text: str) -> list[Any]:
    cases = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                cases.append(json.loads(line))
            except ValueError as error:
                raise ConfigError(f"line {number} of {file} is not JSON: {error}") from error
    return cases


def _listed(answer: dict[str, Any]) -> str:
    rows: list[tuple[str, ...]] = [("ADAPTER", "CASES", "DIGEST")]
    rows += [(row["name"], str(row["count"]), row["digest"][:12]) for row in answer["data"]]
    return table(rows) if len(rows) > 1 else "no adapter has a golden set: loradock golden put NAME FILE"


def _results(answer: dict[str, Any]) -> str:
    rows: list[tuple[str, ...]] = [("VERSION", "SCORE", "95 %", "CASES", "ERRORS", "MISSING")]
    for version in answer["versions"]:
        score = "-" if version["score"] is None else f"{version['score']:.3f}"
        interval = f"{version['low']:.3f} to {version['high']:.3f}"
        counts = [str(version[name]) for name in ("cases", "errors", "missing")]
        rows.append((f"v{version['version']}", score, interval, *counts))
    lines = [table(rows) if len(rows) > 1 else "no version was asked yet"]
    if canary := answer.get("canary"):
        lines.append(
            f"canary v{canary['canary']} against v{canary['live']}: {canary['verdict']}, worse by "
            f"{canary['worse_by']:.3f} on {canary['cases']} of {canary['of_cases']} cases"
        )
        lines += [canary["note"]] if canary["note"] else []
    for case in answer.get("cases", ()):
        if case["result"] in ("fail", "error"):
            detail = f": {case['detail']}" if case.get("detail") else ""
            lines.append(f"case {case['case']} {case['name']} {case['result']}{detail}".replace("  ", " "))
    return "\n".join(lines)
