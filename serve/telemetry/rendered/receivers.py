"""Who Alertmanager tells: mail, Slack and PagerDuty for people, and the server itself for rollbacks.

Secrets stand in files beside alertmanager.yml: `smtp-password`, `slack-url` (an incoming webhook), `pagerduty-key` (an
Events API v2 integration key).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SMTP_PASSWORD = "smtp-password"
SLACK_URL = "slack-url"
PAGERDUTY_KEY = "pagerduty-key"
PEOPLE, ON_CALL = "people", "on-call"
_TITLE = "{{ .Status | toUpper }} {{ .CommonLabels.alertname }} {{ .CommonLabels.adapter }}"
_TEXT = "{{ range .Alerts }}{{ .Annotations.summary }}\n{{ .Annotations.description }}\n{{ end }}"


@dataclass(frozen=True, slots=True)
class Receivers:
    """mail: addresses, by commas; smtp: HOST:PORT of the mail server; slack: a channel; pagerduty: whether pages go
    there."""

    mail: str = ""
    sender: str = "loradock@localhost"
    smtp: str = "localhost:587"
    slack: str = ""
    pagerduty: bool = False

    def people(self) -> list[dict[str, Any]]:
        """The receivers of tickets and of pages. Without any address both are nobody yet."""
        tickets: dict[str, Any] = {"name": PEOPLE}
        if self.mail:
            tickets["email_configs"] = [self._mail()]
        if self.slack:
            tickets["slack_configs"] = [self._slack()]
        if not self.pagerduty:
            return [tickets]
        return [tickets, {**tickets, "name": ON_CALL, "pagerduty_configs": [_pagerduty()]}]

    @property
    def of_pages(self) -> str:
        """The receiver of alerts that must wake somebody."""
        return ON_CALL if self.pagerduty else PEOPLE

    def _mail(self) -> dict[str, Any]:
        return {
            "to": self.mail,
            "from": self.sender,
            "smarthost": self.smtp,
            "auth_username": self.sender,
            "auth_password_file": SMTP_PASSWORD,
            "send_resolved": True,
        }

    def _slack(self) -> dict[str, Any]:
        return {
            "channel": self.slack,
            "api_url_file": SLACK_URL,
            "send_resolved": True,
            "title": _TITLE,
            "text": _TEXT,
        }


# All of them, for `alertmanager/receivers-example.yml`.
EXAMPLE = Receivers(
    mail="on-call@example.com",
    sender="loradock@example.com",
    smtp="smtp.example.com:587",
    slack="#models",
    pagerduty=True,
)


def _pagerduty() -> dict[str, Any]:
    return {
        "routing_key_file": PAGERDUTY_KEY,
        "send_resolved": True,
        "severity": "critical",
        "description": "{{ .CommonLabels.alertname }}: {{ (index .Alerts 0).Annotations.summary }}",
        "details": {"text": _TEXT},
    }
