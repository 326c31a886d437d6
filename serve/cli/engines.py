"""`loradock engines`: the base models of a running server.

Exit codes: 0 done, 1 the server refused, 2 the command is wrong, 3 no server answered.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from serve.cli.arguments import Commands
from serve.cli.terminal import URL, Json, Key, Url, connected, example, say, table

engines_app = typer.Typer(
    name="engines",
    help="List engines, swap the model under one, restart one.",
    no_args_is_help=True,
    rich_markup_mode=None,
    cls=Commands,
)

# As GET /v1/engines says it; and seconds between two looks while `restart` waits.
READY, SETTLED = "ready", ("ready", "failed")
LOOK_SECONDS = 1.0

Name = Annotated[str, typer.Argument(metavar="NAME", help="The base's name, as `loradock engines list` shows it.")]


@engines_app.command("list", epilog=example("loradock engines list"))
def list_(url: Url = URL, key: Key = None, as_json: Json = False) -> None:
    """List the engines: phase, model, load, memory, restarts."""
    with connected("engines", url, key) as client:
        answer = client.engines()
    say(answer, as_json, _listed)


@engines_app.command(
    epilog=example("loradock engines swap smollm2 ./smollm2-w8a8", "loradock engines swap smollm2 smollm2 --force")
)
def swap(
    name: Name,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A folder on this machine or on the server's, or a hub id.")
    ],
    force: Annotated[
        bool, typer.Option("--force", help="Swap even if adapters act differently on the new model.")
    ] = False,
    drain_first: Annotated[
        bool, typer.Option("--drain-first", help="End the old engine before the new one starts, if both do not fit.")
    ] = False,
    url: Url = URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Replace the model under a base's name in traffic.

    On any error the old one continues.
    """
    folder = Path(model).expanduser()
    checkpoint = str(folder.resolve()) if folder.is_dir() else model
    with connected("engines", url, key) as client:
        answer = client.swap(name, checkpoint, force=force, drain_first=drain_first)
    say(answer, as_json, _swapped)


@engines_app.command(epilog=example("loradock engines restart smollm2", "loradock engines restart smollm2 --no-wait"))
def restart(
    name: Name,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Until the engine serves, or has failed again.")
    ] = True,
    timeout: Annotated[float, typer.Option("--timeout", min=1, metavar="SECONDS", help="The longest wait.")] = 900.0,
    url: Url = URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Start an engine again that stayed down.

    After too many deaths; exit code 1 if it does not come.
    """
    began = time.monotonic()
    with connected("engines", url, key) as client:
        answer = client.restart(name)
        asked = answer.get("phase") != READY
        while wait and answer.get("phase") not in SETTLED and time.monotonic() - began < timeout:
            time.sleep(LOOK_SECONDS)
            engines = client.engines().get("data", [])
            answer = next((engine for engine in engines if engine.get("name") == name), answer)
    say(answer, as_json, lambda body: _restarted(body, asked, time.monotonic() - began))
    if wait and answer.get("phase") != READY:
        raise typer.Exit(1)


def _restarted(engine: dict[str, Any], asked: bool, seconds: float) -> str:
    name, phase = engine.get("name"), engine.get("phase")
    why = f": {engine['reason']}" if engine.get("reason") else ""
    if phase != READY:
        return f"{name} is {phase} after {seconds:.0f} s{why}"
    return (
        f"{name} is ready after {seconds:.0f} s" if asked else f"{name} is ready; it was not down, so nothing was done"
    )


def _listed(answer: dict[str, Any]) -> str:
    rows = [("NAME", "PHASE", "MODEL", "WEIGHTS", "RUNNING", "WAITING", "ADAPTERS", "MEMORY", "RESTARTS", "UP")]
    for engine in answer.get("data", []):
        rows.append(
            (
                str(engine.get("name")),
                str(engine.get("phase")) + (f" ({engine['reason']})" if engine.get("reason") else ""),
                str(engine.get("model")),
                str(engine.get("weights") or "-"),
                str(engine.get("running")),
                str(engine.get("waiting")),
                f"{len(engine.get('resident', []))}/{engine.get('max_resident')}",
                f"{engine.get('memory_bytes', 0) / (1 << 20):.0f} MiB",
                str(engine.get("restarts")),
                f"{engine.get('uptime_seconds', 0):.0f} s",
            )
        )
    return table(rows)


def _swapped(answer: dict[str, Any]) -> str:
    lines = [f"{answer.get('name')} is served by {answer.get('model')} now, after {answer.get('seconds')} s"]
    rows = [("ADAPTER", "EFFECT BEFORE", "AFTER", "CHANGED", "")]
    for adapter in answer.get("adapters", []):
        row = (str(adapter["adapter"]), f"{adapter['before']:.3f}", f"{adapter['after']:.3f}", f"{adapter['lost']:.1%}")
        rows.append((*row, str(adapter["problem"])))
    return "\n".join([*lines, table(rows)]) if len(rows) > 1 else lines[0]
