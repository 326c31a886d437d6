"""`loradock loop`: adapters that train, prove and promote their next version by themselves.

Exit codes: 0 done, 1 the server refused, 2 the command is wrong, 3 no server answered.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from serve.cli.arguments import Commands
from serve.cli.terminal import URL, Json, Key, Url, age, example, say, table, told

if TYPE_CHECKING:
    from serve.client.loop_client import LoopClient

loop_app = typer.Typer(
    name="loop",
    help="Adapters that train and promote their next version.",
    no_args_is_help=True,
    rich_markup_mode=None,
    cls=Commands,
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="The adapter.")]
Some = Annotated[str, typer.Argument(metavar="[NAME]", help="The adapter; without it every one (for operators).")]


@contextmanager
def _connected(url: str, key: str | None) -> Iterator[LoopClient]:
    from serve.client.loop_client import LoopClient

    with told("loop"), LoopClient(url, key) as client:
        yield client


@loop_app.command("list", epilog=example("loradock loop list"))
def list_loops(url: Url = URL, key: Key = None, as_json: Json = False) -> None:
    """List the loops of your adapters."""
    with _connected(url, key) as client:
        answer = client.loops()
    say(answer, as_json, _listed)


@loop_app.command(epilog=example("loradock loop show tone", "loradock loop show tone --json"))
def show(name: Name, url: Url = URL, key: Key = None, as_json: Json = False) -> None:
    """Show where a loop is, its tries and references."""
    with _connected(url, key) as client:
        answer = client.loop(name)
    say(answer, as_json, _shown)


@loop_app.command(epilog=example("loradock loop run tone"))
def run(name: Name, url: Url = URL, key: Key = None, as_json: Json = False) -> None:
    """Open a try now.

    Gate, canary and budget stay as the policy says.
    """
    _ask(name, "run", url, key, as_json, "opens a try")


@loop_app.command(epilog=example("loradock loop approve tone"))
def approve(name: Name, url: Url = URL, key: Key = None, as_json: Json = False) -> None:
    """Say yes to the candidate that waits for it.

    It becomes live.
    """
    _ask(name, "approve", url, key, as_json, "promotes its candidate")


@loop_app.command(epilog=example("loradock loop reject tone --why 'the tone is off'"))
def reject(
    name: Name,
    why: Annotated[str, typer.Option("--why", help="For the history.")] = "",
    url: Url = URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """End the try that goes on."""
    _ask(name, "reject", url, key, as_json, "ends its try", why)


@loop_app.command(epilog=example("loradock loop stop tone", "loradock loop stop"))
def stop(name: Some = "", url: Url = URL, key: Key = None, as_json: Json = False) -> None:
    """End the try that goes on; open none until `start`."""
    _ask(name, "stop", url, key, as_json, "is stopped")


@loop_app.command(epilog=example("loradock loop start tone", "loradock loop start"))
def start(name: Some = "", url: Url = URL, key: Key = None, as_json: Json = False) -> None:
    """Let a loop open tries again."""
    _ask(name, "start", url, key, as_json, "may open tries")


@loop_app.command(epilog=example("loradock loop forget tone ref-5d1c0b7e9a3f2846"))
def forget(
    name: Name,
    reference: Annotated[str, typer.Argument(metavar="REFERENCE", help="Its id, as `show` has it.")],
    url: Url = URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Forget a reference with its examples.

    Later candidates are not held against it any more.
    """
    with _connected(url, key) as client:
        answer = client.drop(name, reference)
    say(answer, as_json, lambda _: f"the loop of {name} has no reference {reference} any more")


def _ask(name: str, what: str, url: str, key: str | None, as_json: bool, done: str, why: str = "") -> None:
    with _connected(url, key) as client:
        answer = client.ask(name, what, why) if name else client.everywhere(what)
    say(answer, as_json, lambda _: f"the loop of {name} {done}" if name else f"every loop {done}")


def _listed(answer: dict[str, Any]) -> str:
    rows: list[tuple[str, ...]] = [("ADAPTER", "PHASE", "SINCE", "TRIES", "NOTE")]
    now = time.time()
    for row in answer["data"]:
        month = row.get("month") or {}
        stopped = row["stopped"] or row["stopped_everywhere"]
        note = f"stopped by {stopped}" if stopped else row["note"]
        tries = f"{month.get('tries', 0)} of {month.get('budget', '-')}"
        rows.append((row["name"], row["phase"] or "-", age(row.get("since"), now), tries, note))
    return table(rows) if len(rows) > 1 else "no adapter has a loop"


def _shown(answer: dict[str, Any]) -> str:
    if answer["phase"] is None:
        return f"{answer['name']} has no loop: give it a policy with `loop`"
    month, now = answer["month"], time.time()
    on = ", ".join(answer["on"]) or "nothing"
    lines = [
        f"{answer['name']}: {answer['phase']} for {age(answer['since'], now)}; on {on}",
        f"{month['tries']} of {month['budget']} tries this month, alpha {month['spent']:g} of {month['alpha']:g} spent",
    ]
    if stopped := answer["stopped"] or answer["stopped_everywhere"]:
        lines.append(f"stopped by {stopped}")
    lines += [answer["note"]] if answer["note"] else []
    for one in answer["tries"]:
        outcome = one["outcome"] or "goes on"
        lines.append(f"try {one['try']}, {age(one['began'], now)} ago, {one['cause']['kind']}: {outcome}")
        lines += [f"  {one['text']}"] if one.get("text") else []
        lines += [f"  {one['replay']['text']}"] if one.get("replay") else []
        parts = (one.get("gate") or {}).get("parts", ())
        lines += ["  " + line for line in _gate(parts).splitlines()] if parts else []
    for one in answer["references"]:
        lines.append(f"reference {one['id']}: {one['label']}, {one['examples']} examples")
    return "\n".join(lines)


def _gate(parts: list[dict[str, Any]]) -> str:
    rows: list[tuple[str, ...]] = [("PART", "EXAMPLES", "LIVE", "CANDIDATE", "EVIDENCE", "")]
    for part in parts:
        evidence = f"{part['log_evidence']:.1f} of {part['log_threshold']:.1f}"
        what = f"{part['part']} {part['label']}".strip()
        passed = "passed" if part["passed"] else "failed"
        rows.append((what, str(part["examples"]), f"{part['live']:.3f}", f"{part['candidate']:.3f}", evidence, passed))
    return table(rows)
