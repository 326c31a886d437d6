"""An event arrives signed, once for each URL at least, after failures and restarts too, and at no private address."""

from __future__ import annotations

import asyncio
import base64
import errno
import hmac
import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from serve.config import load
from serve.errors import ConfigError
from serve.events import DriftAlarm
from serve.rollout import webhook
from serve.rollout.webhook import Delivery, Webhooks, checked_url, signing_key
from tests.support.app import push_two
from tests.support.http_service import Handler, serving
from tests.support.waiting import settled

SECRET = "a secret of enough characters"


class Receiver(Handler):
    """A real HTTP server of this machine: `service` keeps what came, and says with which status to answer."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"])).decode()
        self.service.requests.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
        self.reply(self.service.status, headers={"location": "/elsewhere"} if self.service.status == 302 else {})


@pytest.fixture
def receiver():
    receiver = SimpleNamespace(requests=[], status=204)
    with serving(Receiver, receiver) as url:
        receiver.url = f"{url}/hooks?from=loradock"
        yield receiver


class Clock:
    now = 1_764_000_000.0

    def __call__(self) -> float:
        return self.now


def valid(headers, body, secret=SECRET):
    """What a receiver does, as Standard Webhooks has it."""
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.{body}".encode()
    version, _, signature = headers["webhook-signature"].partition(",")
    return version == "v1" and hmac.compare_digest(
        base64.b64decode(signature), hmac.digest(signing_key(secret), signed, "sha256")
    )


def metrics(hooks):
    return {
        (sample.name, *sample.labels.values()): sample.value for family in hooks.collect() for sample in family.samples
    }


def test_an_event_arrives_signed_and_is_forgotten(tmp_path, receiver):
    hooks = Webhooks(tmp_path / "webhooks", [receiver.url], SECRET, private=True)
    hooks.send("drift.alarm", {"adapter": "tone", "text": "wahrscheinlich größer"})
    assert len(list((tmp_path / "webhooks").iterdir())) == 1
    hooks.deliver_due()
    ((path, headers, body),) = receiver.requests
    assert path == "/hooks?from=loradock" and headers["content-type"] == "application/json"
    event = json.loads(body)
    assert event["type"] == "drift.alarm" and event["data"] == {"adapter": "tone", "text": "wahrscheinlich größer"}
    assert valid(headers, body) and headers["idempotency-key"] == headers["webhook-id"]
    assert not valid(headers, body.replace("tone", "else")) and not valid(headers, body, "another secret")
    assert list((tmp_path / "webhooks").iterdir()) == []
    assert metrics(hooks)["loradock_webhook_deliveries_total", "delivered"] == 1
    hooks.deliver_due()
    assert len(receiver.requests) == 1


def test_what_fails_is_sent_again_later_and_later_with_the_same_id_also_after_a_restart(tmp_path, receiver):
    clock = Clock()
    hooks = Webhooks(tmp_path, [receiver.url], SECRET, private=True, clock=clock)
    receiver.status = 503
    hooks.send("rollback", {"adapter": "tone"})
    due = []
    for _ in range(200):
        hooks.deliver_due()
        if len(receiver.requests) > len(due):
            due.append(clock.now)
        clock.now += 1
    pauses = [later - earlier for earlier, later in itertools.pairwise(due)]
    assert pauses[:4] == [5, 10, 20, 40] and metrics(hooks)["loradock_webhook_pending",] == 1
    again = Webhooks(tmp_path, [receiver.url], SECRET, private=True, clock=clock)
    receiver.status = 200
    clock.now += 3600
    again.deliver_due()
    ids = {headers["webhook-id"] for _, headers, _ in receiver.requests}
    stamps = [headers["webhook-timestamp"] for _, headers, _ in receiver.requests]
    assert len(ids) == 1 and stamps == sorted(set(stamps)), "signed anew each time"
    assert list(tmp_path.iterdir()) == [] and all(valid(headers, body) for _, headers, body in receiver.requests)


def test_an_event_that_cannot_be_read_now_is_sent_later_and_a_damaged_one_is_deleted(tmp_path, receiver, monkeypatch):
    hooks = Webhooks(tmp_path, [receiver.url], SECRET, private=True)
    hooks.send("rollback", {})
    (tmp_path / "000.json").write_text("{")

    def fail(file):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", fail)
        hooks.deliver_due()
    assert not receiver.requests and metrics(hooks)["loradock_webhook_pending",] == 2
    hooks.deliver_due()
    assert len(receiver.requests) == 1 and list(tmp_path.iterdir()) == []


def test_what_nobody_takes_for_a_day_is_given_up_and_counted(tmp_path, receiver):
    clock = Clock()
    hooks = Webhooks(tmp_path, [receiver.url], SECRET, private=True, clock=clock)
    receiver.status = 400
    hooks.send("rollback", {})
    for _ in range(200):
        hooks.deliver_due()
        clock.now += 600
    assert list(tmp_path.iterdir()) == [] and metrics(hooks)["loradock_webhook_deliveries_total", "given_up"] == 1
    assert 10 < len(receiver.requests) < 40


def test_an_event_that_is_never_taken_keeps_no_other_from_arriving(tmp_path):
    taken, clock = [], Clock()

    def post(delivery, headers):
        if "poison" in delivery.body:
            raise OSError("it answered 400")
        taken.append(delivery.body)

    hooks = Webhooks(tmp_path, ["https://a.example"], SECRET, post=post, clock=clock)
    hooks.send("first", {"poison": 1})
    clock.now += 1
    hooks.send("second", {})
    for _ in range(10):
        hooks.deliver_due()
        clock.now += 1
    assert [json.loads(body)["type"] for body in taken] == ["second"]


def test_each_url_gets_it_and_one_that_is_down_delays_no_other(tmp_path):
    taken = []

    def post(delivery, headers):
        if delivery.url == "https://down.example":
            raise ConnectionRefusedError("refused")
        taken.append(headers["webhook-id"])

    urls = ["https://down.example", "https://up.example"]
    hooks = Webhooks(tmp_path, urls, SECRET, post=post)
    for _ in range(3):
        hooks.send("rollback", {})
    hooks.deliver_due()
    assert len(set(taken)) == 3 and metrics(hooks)["loradock_webhook_pending",] == 3
    # A URL that is not configured any more is not called.
    Webhooks(tmp_path, ["https://up.example"], SECRET, post=post).deliver_due()
    assert list(tmp_path.iterdir()) == [] and len(taken) == 3


def test_the_queue_is_bounded_and_the_oldest_make_room(tmp_path, monkeypatch):
    monkeypatch.setattr(webhook, "MOST", 5)
    clock = Clock()
    hooks = Webhooks(tmp_path, ["https://a.example"], SECRET, clock=clock)
    for number in range(8):
        clock.now += 1
        hooks.send("rollback", {"number": number})
    kept = [json.loads(json.loads(file.read_text())["body"])["data"]["number"] for file in sorted(tmp_path.iterdir())]
    assert kept == [3, 4, 5, 6, 7]
    assert metrics(hooks)["loradock_webhook_deliveries_total", "dropped"] == 3
    (tmp_path / "000000000000001-torn.json").write_text("{")
    Webhooks(tmp_path, [], SECRET).deliver_due()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "10.1.2.3", "169.254.169.254", "[::1]", "[::ffff:10.0.0.1]"]
)
def test_a_private_address_is_not_called_unless_it_is_allowed(host, tmp_path, receiver):
    delivery = Delivery("msg_1", receiver.url.replace("127.0.0.1", host), "{}", 0.0, 0.0)
    with pytest.raises(OSError, match="not a public address"):
        webhook._post(delivery, {}, private=False)
    assert receiver.requests == []


def test_a_redirect_is_not_followed(tmp_path, receiver):
    receiver.status = 302
    with pytest.raises(OSError, match="answered 302"):
        webhook._post(Delivery("msg_1", receiver.url, "{}", 0.0, 0.0), {}, private=True)
    assert [path for path, _, _ in receiver.requests] == ["/hooks?from=loradock"]


def test_a_full_disk_loses_an_event_and_stops_nobody(tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(webhook, "write_whole", full)
    hooks = Webhooks(tmp_path, ["https://a.example", "https://b.example"], SECRET)
    hooks.send("rollback", {})
    assert metrics(hooks)["loradock_webhook_deliveries_total", "dropped"] == 2


def test_a_secret_is_text_or_base64():
    assert signing_key("abc") == b"abc"
    assert signing_key("whsec_" + base64.b64encode(b"x" * 24).decode()) == b"x" * 24
    with pytest.raises(ConfigError, match="base64"):
        signing_key("whsec_not!base64")


@pytest.mark.parametrize("url", ["", "ftp://a/b", "example.com/hook", "https://", "https://u:p@a/", "http://a:99999/"])
def test_what_is_no_webhook_is_refused_with_what_is_taken(url):
    with pytest.raises(ConfigError, match="https://HOST"):
        checked_url(url)


def test_webhooks_need_a_secret_from_one_place(tmp_path):
    url = "https://hooks.example/loradock"
    with pytest.raises(ConfigError, match="webhook_secret"):
        load(["--webhooks", url], {})
    with pytest.raises(ConfigError, match="16 characters"):
        load(["--webhooks", url, "--webhook-secret", "short"], {})
    file = tmp_path / "secret"
    file.write_text(SECRET + "\n")
    config = load(["--webhooks", url, "--webhook-secret-file", str(file)], {})
    assert config.webhooks == (url,) and config.webhook_secret == SECRET
    with pytest.raises(ConfigError, match="one of them"):
        load(["--webhook-secret", SECRET, "--webhook-secret-file", str(file)], {})
    with pytest.raises(ConfigError, match="cannot be read"):
        load(["--webhook-secret-file", str(tmp_path / "none")], {})
    assert load(["--webhooks", url], {"LORADOCK_WEBHOOK_SECRET": SECRET}).webhook_secret == SECRET


async def test_the_server_tells_of_alarms_and_rollbacks(connect, config, make_adapter, receiver):
    config = replace(config, webhooks=(receiver.url,), webhook_secret=SECRET, webhook_private=True)
    async with connect(config) as client:
        await push_two(client, make_adapter)
        await client.post("/v1/adapters/tone/promote", json={"version": 2})
        parts = client._transport.app.state.parts
        moved = {"text": "in at least 60 % of the prompts: probably German", "share_at_least": 0.6}
        alarm = DriftAlarm("tone", "v2", "prompt", {"rank_shift": 0.3}, 12.0, moved)
        parts.events.publish(alarm)
        result = await parts.automatic_rollback.rollback("tone", 2, "alert", {"errors": 0.3})
        assert result.done
        assert await settled(lambda: asyncio.sleep(0.02, len(receiver.requests) == 2))
    events = [json.loads(body) for _, _, body in receiver.requests]
    assert [event["type"] for event in events] == ["drift.alarm", "rollback"]
    assert events[0]["data"]["text"] == moved["text"] and events[0]["data"]["moved"] == moved
    assert (events[1]["data"]["outcome"], events[1]["data"]["version"]) == ("rolled_back", 2)
    assert all(valid(headers, body) for _, headers, body in receiver.requests)
