"""Alertmanager takes what is rendered for it, with mail, Slack and PagerDuty and without."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from serve.telemetry.rendered.receivers import EXAMPLE, PAGERDUTY_KEY, SLACK_URL, SMTP_PASSWORD, Receivers
from serve.telemetry.rendered.render import Places, render
from serve.telemetry.slo import DEFAULT_SLOS

ROOT = Path(__file__).parents[3]
CHOICES = {
    "nobody": Receivers(),
    "mail": Receivers(mail="a@example.com, b@example.com", smtp="mail:25"),
    "slack": Receivers(slack="#models"),
    "pagerduty": Receivers(pagerduty=True),
    "all": EXAMPLE,
}


def rendered(receivers: Receivers) -> str:
    return render(DEFAULT_SLOS, Places(), receivers)["alertmanager/alertmanager.yml"]


@pytest.mark.skipif(not shutil.which("amtool"), reason="amtool is not installed (Debian: prometheus-alertmanager)")
@pytest.mark.parametrize("choice", CHOICES)
def test_alertmanager_accepts_every_choice_of_receivers(choice, tmp_path):
    (tmp_path / "alertmanager.yml").write_text(rendered(CHOICES[choice]))
    for name in ("alert-key", SMTP_PASSWORD, SLACK_URL, PAGERDUTY_KEY):
        (tmp_path / name).write_text("https://hooks.slack.com/services/x\n")
    done = subprocess.run(
        ["amtool", "check-config", "alertmanager.yml"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_pages_wake_somebody_and_tickets_do_not():
    config = yaml.safe_load(rendered(EXAMPLE))
    receivers = {receiver["name"]: receiver for receiver in config["receivers"]}
    (pages,) = [route for route in config["route"]["routes"] if 'severity="page"' in route["matchers"]]
    assert "pagerduty_configs" in receivers[pages["receiver"]]
    assert "pagerduty_configs" not in receivers[config["route"]["receiver"]]
    for receiver in (receivers[pages["receiver"]], receivers[config["route"]["receiver"]]):
        assert receiver["email_configs"][0]["to"] == EXAMPLE.mail and receiver["slack_configs"]


def test_no_secret_stands_in_what_is_rendered():
    text = rendered(EXAMPLE)
    for file in (SMTP_PASSWORD, SLACK_URL, PAGERDUTY_KEY):
        assert f"_file: {file}" in text
    assert "auth_password:" not in text and "routing_key:" not in text and "api_url:" not in text


def test_a_trace_can_be_opened_from_an_exemplar():
    files = render(DEFAULT_SLOS, Places(traces="https://tempo.example/{trace_id}?org=1"))
    (source,) = yaml.safe_load(files["provisioning/datasources/prometheus.yml"])["datasources"]
    (destination,) = source["jsonData"]["exemplarTraceIdDestinations"]
    assert destination["name"] == "trace_id"
    assert destination["url"] == "https://tempo.example/$${__value.raw}?org=1", "Grafana makes $ of $$"
