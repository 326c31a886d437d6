"""`loradock monitoring`: the files that Prometheus, Alertmanager and Grafana read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from serve.cli.arguments import Commands
from serve.cli.terminal import example
from serve.config import load

# The defaults of `serve.telemetry.rendered`, which is imported when it is needed.
SENDER = "loradock@localhost"
SMTP = "localhost:587"
TRACES = "http://localhost:16686/trace/{trace_id}"

# How help groups the options.
RECEIVERS, PLACES = "Who gets alerts", "Where what listens"

monitoring_app = typer.Typer(
    name="monitoring",
    help="Write the files of Prometheus, Alertmanager, Grafana.",
    no_args_is_help=True,
    rich_markup_mode=None,
    cls=Commands,
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
        str, typer.Option("--server", rich_help_panel=PLACES, metavar="HOST:PORT", help="Where loradock serves.")
    ] = "loradock:8000",
    prometheus: Annotated[
        str, typer.Option("--prometheus", rich_help_panel=PLACES, metavar="HOST:PORT", help="Where Prometheus listens.")
    ] = "prometheus:9090",
    alertmanager: Annotated[
        str,
        typer.Option("--alertmanager", rich_help_panel=PLACES, metavar="HOST:PORT", help="Where Alertmanager listens."),
    ] = "alertmanager:9093",
    tls: Annotated[bool, typer.Option("--tls", rich_help_panel=PLACES, help="loradock serves https.")] = False,
    mail: Annotated[
        str, typer.Option("--mail", rich_help_panel=RECEIVERS, metavar="ADDRESSES", help="Who gets alerts by mail.")
    ] = "",
    sender: Annotated[
        str, typer.Option("--from", rich_help_panel=RECEIVERS, metavar="ADDRESS", help="Who the mail is from.")
    ] = SENDER,
    smtp: Annotated[
        str, typer.Option("--smtp", rich_help_panel=RECEIVERS, metavar="HOST:PORT", help="The mail server.")
    ] = SMTP,
    slack: Annotated[
        str,
        typer.Option("--slack", rich_help_panel=RECEIVERS, metavar="CHANNEL", help="A Slack channel that gets alerts."),
    ] = "",
    pagerduty: Annotated[
        bool, typer.Option("--pagerduty", rich_help_panel=RECEIVERS, help="Alerts that page go to PagerDuty too.")
    ] = False,
    traces: Annotated[
        str,
        typer.Option(
            "--traces", rich_help_panel=PLACES, metavar="URL", help="Where a trace is looked at, with {trace_id} in it."
        ),
    ] = TRACES,
) -> None:
    """Write rules, alerts and dashboards to DIR.

    All from the server's configuration.

    Beside prometheus.yml put `scrape-key`, a file with a key that may read /metrics; beside alertmanager.yml
    `alert-key`, one with a key that may roll back, and what the receivers need: `smtp-password`, `slack-url`,
    `pagerduty-key`. LORADOCK_* variables count as they do for `loradock serve`.
    """
    from serve.telemetry.rendered.receivers import Receivers
    from serve.telemetry.rendered.render import Places, write

    slos = load(["--config", str(config)] if config else []).slos
    places = Places(server=server, prometheus=prometheus, alertmanager=alertmanager, tls=tls, traces=traces)
    receivers = Receivers(mail=mail, sender=sender, smtp=smtp, slack=slack, pagerduty=pagerduty)
    written = write(out, slos, places, receivers)
    for file in written:
        typer.echo(file)
    if not written:
        typer.echo(f"{out} is up to date")
