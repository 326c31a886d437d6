"""Tells other systems what happened: drift alarms, verdicts on canaries, rollbacks, as signed HTTP requests.

    webhooks = Webhooks(folder, urls, secret)
    webhooks.send("drift.alarm", {"adapter": "tone", ...})     # a file for each URL; not for the event loop
    webhooks.tell(notice)                                      # the same for an event
    await webhooks.run()                                       # delivers them in a thread until cancelled

The form is that of Standard Webhooks (standardwebhooks.com): JSON `{"type", "timestamp", "data"}` with the headers
`webhook-id`, `webhook-timestamp` and `webhook-signature`, which is `v1,` and the base64 of HMAC-SHA256 over
`ID.TIMESTAMP.BODY`. The id is the same at every attempt and every URL, also in `idempotency-key`: a receiver that has
seen it may ignore the request. What is not answered with 2xx is sent again, with longer and longer pauses, for a day,
also after a restart.

Addresses that are not public are refused when the socket is made, unless they are allowed: a name may change where it
leads. Redirects are not followed.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import http.client
import json
import logging
import secrets
import socket
import ssl
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from serve import __version__
from serve.asgi.public_address import is_public
from serve.errors import ConfigError
from serve.events import Notice
from serve.files import write_whole

log = logging.getLogger(__name__)

# The pause after the first failure; each further one is twice as long.
RETRY_SECONDS, MAX_RETRY_SECONDS = 5.0, 3600.0
# Then an event is given up.
PATIENCE_SECONDS = 86_400.0
# Deliveries that wait on the disk; the oldest make room.
MOST = 1000
TIMEOUT_SECONDS = 10.0
LOOK_SECONDS = 1.0
DELIVERED, GIVEN_UP, DROPPED = RESULTS = ("delivered", "given_up", "dropped")
_PREFIX = "whsec_"


@dataclass(frozen=True, slots=True)
class Delivery:
    """One event for one URL. `created` and `due` in seconds; `body` is what is signed."""

    id: str
    url: str
    body: str
    created: float
    due: float
    attempts: int = 0

    @property
    def file_name(self) -> str:
        """In the order of creation; the same for the same event and URL."""
        where = hashlib.sha256(self.url.encode()).hexdigest()[:12]
        return f"{round(self.created * 1000):015d}-{self.id}-{where}.json"


class Webhooks(Collector):
    """secret: of the signatures, as text or as whsec_BASE64. private: whether private addresses may be asked.

    `post` sends one delivery and raises OSError if it was not taken.
    """

    def __init__(
        self,
        folder: Path,
        urls: Sequence[str],
        secret: str,
        *,
        private: bool = False,
        post: Callable[[Delivery, Mapping[str, str]], None] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._folder = folder
        self._urls = tuple(map(checked_url, urls))
        self._clock = clock
        self._key = signing_key(secret)
        self._post = post or (lambda delivery, headers: _post(delivery, headers, private))
        self._results: Counter[str] = Counter()
        self._pending = 0

    def send(self, kind: str, data: Mapping[str, Any]) -> None:
        """Have an event of this type delivered to every URL. Writes to disk; not for the event loop."""
        if not self._urls:
            return
        now = self._clock()
        when = datetime.fromtimestamp(now, UTC).isoformat(timespec="milliseconds")
        body = json.dumps({"type": kind, "timestamp": when, "data": data}, default=str, ensure_ascii=False)
        id = f"msg_{secrets.token_hex(12)}"
        try:
            for url in self._urls:
                self._write(Delivery(id, url, body, now, now))
            self._make_room()
        except OSError as error:
            self._results[DROPPED] += len(self._urls)
            log.error("the event %s for webhooks was not written: %s", kind, error.strerror)

    def tell(self, notice: Notice) -> None:
        """`send` what an event says."""
        self.send(notice.kind, notice.data())

    async def run(self) -> None:
        """Deliver what is due, for ever."""
        while True:
            await asyncio.to_thread(self.deliver_due)
            await asyncio.sleep(LOOK_SECONDS)

    def deliver_due(self) -> None:
        """Try everything that is due, once; a URL that fails gets nothing more until the next round."""
        files = self._files()
        failed: set[str] = set()
        for file in files:
            try:
                delivery = _read(file)
            except OSError as error:  # dropped meanwhile, or it can be read later
                log.warning("%s cannot be read now: %s", file.name, error.strerror)
                continue
            if delivery is None or delivery.url not in self._urls:
                file.unlink(missing_ok=True)  # damaged, or its URL was taken out of the configuration
            elif delivery.url not in failed and not self._attempt(file, delivery):
                failed.add(delivery.url)
        self._pending = len(self._files())

    def headers(self, delivery: Delivery) -> dict[str, str]:
        """Those of one attempt, signed now."""
        timestamp = str(int(self._clock()))
        signed = f"{delivery.id}.{timestamp}.{delivery.body}".encode()
        signature = base64.b64encode(hmac.digest(self._key, signed, "sha256")).decode()
        return {
            "content-type": "application/json",
            "user-agent": f"loradock/{__version__}",
            "idempotency-key": delivery.id,
            "webhook-id": delivery.id,
            "webhook-timestamp": timestamp,
            "webhook-signature": f"v1,{signature}",
        }

    def collect(self) -> Iterator[Metric]:
        deliveries = CounterMetricFamily(
            "loradock_webhook_deliveries",
            "Events at an end, by URL: delivered, given up after a day, or dropped because too many waited.",
            labels=("result",),
        )
        for result in RESULTS:
            deliveries.add_metric((result,), self._results[result])
        yield deliveries
        yield GaugeMetricFamily(
            "loradock_webhook_pending", "Events that wait to be delivered when it is scraped.", value=self._pending
        )

    def _attempt(self, file: Path, delivery: Delivery) -> bool:
        """Whether other events for the same URL may follow at once."""
        now = self._clock()
        if delivery.due > now:
            return True
        try:
            self._post(delivery, self.headers(delivery))
        except (OSError, http.client.HTTPException, ValueError) as error:
            host = urlsplit(delivery.url).hostname
            if now - delivery.created > PATIENCE_SECONDS:
                log.error("the webhook at %s never took %s, which is given up: %s", host, delivery.id, error)
                return self._end(file, GIVEN_UP)
            pause = min(MAX_RETRY_SECONDS, RETRY_SECONDS * 2.0 ** min(delivery.attempts, 20))
            log.warning(
                "the webhook at %s did not take %s, trying again in %.0f s: %s", host, delivery.id, pause, error
            )
            self._write(replace(delivery, due=now + pause, attempts=delivery.attempts + 1))
            return False
        return self._end(file, DELIVERED)

    def _end(self, file: Path, result: str) -> bool:
        self._results[result] += 1
        file.unlink(missing_ok=True)
        return True

    def _write(self, delivery: Delivery) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_whole(self._folder / delivery.file_name, json.dumps(asdict(delivery)).encode())

    def _make_room(self) -> None:
        files = self._files()
        for file in files[: max(0, len(files) - MOST)]:
            log.error("%d events wait for webhooks: the oldest is dropped", len(files))
            self._end(file, DROPPED)
        self._pending = min(len(files), MOST)

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob("[0-9]*.json"))


def signing_key(secret: str) -> bytes:
    """The bytes that sign: of whsec_BASE64 those within, else the text's own."""
    if not secret.startswith(_PREFIX):
        return secret.encode()
    try:
        return base64.b64decode(secret.removeprefix(_PREFIX), validate=True)
    except ValueError as error:
        raise ConfigError("a webhook secret that begins with whsec_ goes on in base64") from error


def checked_url(url: str, setting: str = "webhooks") -> str:
    """The URL, if a setting of webhooks or links may have it; else ConfigError."""
    parts = urlsplit(url)
    try:
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and not parts.username
    except ValueError:
        usable = False
    if not usable:
        raise ConfigError(f"{setting} takes URLs as https://HOST[:PORT]/PATH without a user, not {url!r}")
    return url


def _read(file: Path) -> Delivery | None:
    """The event in a file; None if it is damaged."""
    try:
        return Delivery(**json.loads(file.read_bytes()))
    except (ValueError, TypeError) as error:
        log.warning("%s is no event for a webhook: %s", file.name, error)
        return None


def _post(delivery: Delivery, headers: Mapping[str, str], private: bool) -> None:
    """Send it, or raise OSError (or HTTPException) when it was not taken."""
    parts = urlsplit(delivery.url)
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    connection = _connection(parts.scheme == "https", parts.hostname or "", parts.port, private)
    try:
        connection.request("POST", path, delivery.body.encode(), dict(headers))
        status = connection.getresponse().status
    finally:
        connection.close()
    if not 200 <= status < 300:
        raise OSError(f"it answered {status}")


def _connection(tls: bool, host: str, port: int | None, private: bool) -> http.client.HTTPConnection:
    kind = http.client.HTTPSConnection if tls else http.client.HTTPConnection
    connection = kind(host, port, timeout=TIMEOUT_SECONDS)
    # Connected here, to an address that was looked at: the connection would resolve the name by itself.
    plain = _socket(host, connection.port, private)
    connection.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=host) if tls else plain
    return connection


def _socket(host: str, port: int, private: bool) -> socket.socket:
    failure: OSError | None = None
    for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        if not private and not is_public(str(address[0])):
            failure = OSError(f"{host} leads to {address[0]}, which is not a public address (see webhook_private)")
            continue
        made = socket.socket(family, kind, protocol)
        made.settimeout(TIMEOUT_SECONDS)
        try:
            made.connect(address)
        except OSError as error:
            made.close()
            failure = error
            continue
        return made
    raise failure or OSError(f"{host} has no address")
