"""`loradock monitoring`: the files that Prometheus, Alertmanager and Grafana read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from serve.cli.terminal import example
from serve.config import load

monitoring_app = typer.Typer(
    name="monitoring",
    help="Render the configuration of Prometheus, Alertmanager and Grafana.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@monitoring_app.callback()
def _group() -> None:
    """Keeps `render` a word of its own while it is the only one."""


@monitoring_app.command(
    epilog=example(
        "loradock monitoring render --out grafana",
        "loradock monitoring render --config loradock.yaml --out /etc/loradock --server 10.0.0.7:8000 --tls",
    )
)
def render(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to write to.")],
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="The server's configuration, for its SLOs.")
    ] = None,
    server: Annotated[
        str, typer.Option("--server", metavar="HOST:PORT", help="Where loradock serves.")
    ] = "loradock:8000",
    prometheus: Annotated[
        str, typer.Option("--prometheus", metavar="HOST:PORT", help="Where Prometheus listens.")
    ] = "prometheus:9090",
    alertmanager: Annotated[
        str, typer.Option("--alertmanager", metavar="HOST:PORT", help="Where Alertmanager listens.")
    ] = "alertmanager:9093",
    tls: Annotated[bool, typer.Option("--tls", help="loradock serves https.")] = False,
) -> None:
    """Write rules, alerts, dashboards and their wiring to DIR, all from the server's configuration.

    Beside prometheus.yml put `scrape-key`, a file with a key that may read /metrics; beside alertmanager.yml
    `alert-key`, one with a key that may roll back. LORADOCK_* variables count as they do for `loradock serve`.
    """
    from serve.telemetry.rendered.render import Places, write

    slos = load(["--config", str(config)] if config else []).slos
    places = Places(server=server, prometheus=prometheus, alertmanager=alertmanager, tls=tls)
    written = write(out, slos, places)
    for file in written:
        typer.echo(file)
    if not written:
        typer.echo(f"{out} is up to date")
