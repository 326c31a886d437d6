"""What the server sees of real answers: latencies token by token, drift, and a damaged version that is sent away.

`make watch` runs the same with more traffic (LORADOCK_TEST_DRIFT times as much).
"""

from __future__ import annotations

import json
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.support.lora import WEIGHTS, read_tensors, variant
from tests.support.server import done
from tests.support.waiting import eventually

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

MORE = int(os.environ.get("LORADOCK_TEST_DRIFT", "1"))
STREAMS = 16
# Two vocabularies, as of two groups of users.
WORDS = """
tree flower river stone bread window horse garden summer winter morning kitchen apple bridge mountain village
letter music shadow silver candle basket feather ladder meadow orchard pebble ribbon saddle thunder valley willow

insulin biopsy anemia lesion dosage sepsis stroke tumor fever antibody vaccine plasma suture catheter renal hepatic
cardiac thyroid edema gastric spinal arterial clinical symptom diagnosis therapy oncology pathology trauma
"""
GARDEN, CLINIC = (part.split() for part in WORDS.split("\n\n"))


class Traffic:
    """Prompts that nobody sent before, each by an asker of their own, `STREAMS` at a time."""

    def __init__(self, server, name, seed=0):
        self.server, self.name = server, name
        self.lots = random.Random(seed)
        self.count = 0

    def send(self, count, words=GARDEN, tokens=3, **more):
        bodies = []
        for _ in range(count):
            self.count += 1
            said = " ".join(self.lots.choices(words, k=self.lots.randint(6, 14)))
            messages = [{"role": "user", "content": said}]
            body = {"model": self.name, "messages": messages, "max_tokens": tokens, "user": f"{self.name}-{self.count}"}
            # Words as they come: with the model's own defaults nearly all answers are one.
            bodies.append(body | {"temperature": 1.0, "top_p": 1.0} | more)
        with ThreadPoolExecutor(STREAMS) as pool:
            return list(pool.map(self._ask, bodies))

    def _ask(self, body):
        return done(self.server.http.post("/v1/chat/completions", json=body))


def report(server, name):
    return done(server.http.get(f"/v1/adapters/{name}/drift"))


def version(server, name, number):
    return next(one for one in report(server, name)["versions"] if one["version"] == f"v{number}")


def series(server, metric, **labels):
    """The values of a metric's series with these labels."""
    found = []
    scraped = server.http.get("/metrics")
    assert scraped.status_code == 200, scraped.text
    for line in scraped.text.splitlines():
        if line.startswith((f"{metric}{{", f"{metric} ")) and all(f'{k}="{v}"' in line for k, v in labels.items()):
            found.append(float(line.rsplit(" ", 1)[1]))
    return found


def noise(tensors, config):
    """A damaged file: every weight goes astray by many times what it is worth.

    At 32 times the broken answers are as sure as the healthy ones, and no check sees them; at 90 far from it.
    """
    lots = np.random.default_rng(0)
    for name, tensor in tensors.items():
        tensors[name] = tensor + lots.standard_normal(tensor.shape).astype(np.float32) * tensor.std() * 90


def summed(other):
    """A wrong merge: the factors of two adapters summed one by one, where their products had to be."""

    def edit(tensors, config):
        for name, tensor in read_tensors(other / WEIGHTS).items():
            tensors[name] = tensors[name] + tensor

    return edit


def test_an_answer_is_measured_token_by_token_also_when_it_does_not_stream(server, adapters, name):
    server.upload(name, adapters["alpha"])
    body = {"model": name, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 8, "temperature": 0}
    streamed = server.ask(name, tokens=8)
    assert streamed.done
    answer = server.http.post("/v1/chat/completions", json=body)  # the last one: a bucket keeps its latest exemplar
    usage = answer.json()["usage"]
    time.sleep(1.1)  # whatever was rendered before these answers is good for a second
    labels = {"adapter": name, "version": "v1"}
    text = "loradock_{}"
    counted = {
        metric: sum(series(server, text.format(metric), **labels))
        for metric in (
            "requests_total",
            "time_to_first_token_seconds_count",
            "inter_token_latency_seconds_count",
            "max_inter_token_latency_seconds_count",
            "request_duration_seconds_count",
            "queue_time_seconds_count",
        )
    }
    assert set(counted.values()) == {2.0}, counted
    assert series(server, "loradock_generation_tokens_total", **labels)[0] == 16
    assert series(server, "loradock_prompt_tokens_total", **labels)[0] > usage["prompt_tokens"]
    (gap,) = series(server, "loradock_inter_token_latency_seconds_sum", **labels)
    (worst,) = series(server, "loradock_max_inter_token_latency_seconds_sum", **labels)
    (first,) = series(server, "loradock_time_to_first_token_seconds_sum", **labels)
    (total,) = series(server, "loradock_request_duration_seconds_sum", **labels)
    # Means of 7 gaps each; together with the first tokens they fill the whole time, but for what HTTP takes.
    # The gaps are timed where the engine makes the tokens, the first one and the whole where they come in.
    assert 0 < gap <= worst and first > 0 and 0.5 * total < first + 7 * gap < 1.1 * total
    # The id in the answer, in its header, and beside the numbers for whoever takes exemplars.
    id = answer.headers["x-request-id"]
    assert id in answer.json()["id"]
    told = server.http.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert told.headers["content-type"].startswith("application/openmetrics-text")
    assert f'request_id="{id}"' in told.text and told.text.endswith("# EOF\n") and told.text.count("# EOF") == 1
    assert "vllm:lora_requests_info" in server.http.get("/metrics/engine").text


def test_log_probabilities_that_nobody_asked_for_are_looked_at_and_not_shown(server, adapters, name):
    """Half of the requests of a canary's name carry them through the engine."""
    server.upload(name, adapters["alpha"])
    server.upload(name, adapters["bravo"], promote=False)
    done(server.http.post(f"/v1/adapters/{name}/canary", json={"version": 2, "weight": 0.5}))
    traffic = Traffic(server, name)

    def begun():
        traffic.send(1, tokens=2)
        return (report(server, name)["canary"] or {}).get("checks")

    assert eventually(begun)
    answers = traffic.send(24, tokens=2)
    assert all(answer["choices"][0].get("logprobs") is None for answer in answers)
    asked = traffic.send(4, tokens=2, logprobs=True, top_logprobs=2)
    assert all(len(answer["choices"][0]["logprobs"]["content"]) == 2 for answer in asked)
    assert all(len(one["top_logprobs"]) == 2 for answer in asked for one in answer["choices"][0]["logprobs"]["content"])

    def looked_at():
        trial = report(server, name)["canary"]
        (check,) = [one for one in trial["checks"] if one["check"] == "mean_logprob"]
        return check["canary_requests"] + check["live_requests"]

    assert eventually(lambda: looked_at() >= 8), report(server, name)["canary"]


def test_steady_traffic_raises_nothing_and_another_topic_does_and_rolls_nothing_back(server, adapters, name):
    server.upload(name, adapters["alpha"])
    server.upload(name, adapters["bravo"])
    traffic = Traffic(server, name)
    traffic.send(200 * MORE)

    def watching():
        signals = version(server, name, 2)["signals"]
        return signals if signals["prompt"]["phase"] == signals["output"]["phase"] == "watching" else None

    signals = eventually(watching)
    assert not any(signal["alarmed"] for signal in signals.values()), signals
    traffic.send(100 * MORE, CLINIC)
    assert eventually(lambda: version(server, name, 2)["signals"]["prompt"]["alarmed"])
    moved = version(server, name, 2)["signals"]["prompt"]
    assert moved["since"] and moved["moved"] and moved["log_evidence"] > 0
    shown = server.adapter(name)
    assert shown["live"] == 2
    assert any((row["who"], row["what"]) == ("watcher", "drift") for row in shown["history"])
    labels = {"adapter": name, "version": "v2", "signal": "prompt"}
    assert series(server, "loradock_drift_alarms_total", **labels) == [1.0]
    assert not series(server, "loradock_rollbacks_total", adapter=name)


@pytest.mark.parametrize("damage", ["noise on the weights", "a wrong merge"])
def test_a_damaged_version_is_sent_away_within_sixty_of_its_requests(server, adapters, name, tmp_path, damage):
    """The answers are the base's, of many words and less than sure, as an adapter's that was not overtrained."""
    healthy = variant(adapters["bravo"], tmp_path / "healthy", scale=0.05)
    edit = noise if damage.startswith("noise") else summed(adapters["alpha"])
    done(server.upload(name, healthy))
    damaged = server.upload(name, variant(healthy, tmp_path / "damaged", edit=edit), promote=False)
    assert damaged.status_code == 201, damaged.text
    done(server.http.post(f"/v1/adapters/{name}/canary", json={"version": 2, "weight": 0.25}))
    # Of noise, chance decides more: 17 to 43 of its answers in the runs that were looked at, 22 of the wrong merge.
    most = 60 if "merge" in damage or MORE > 1 else 100
    sent_away(server, name, Traffic(server, name), "quality", most=most + STREAMS)


def test_a_healthy_version_stays(server, adapters, name, tmp_path):
    for version, scale in enumerate((0.05, 0.049)):
        healthy = variant(adapters["bravo"], tmp_path / str(version), scale=scale)
        done(server.upload(name, healthy, promote=not version))
    done(server.http.post(f"/v1/adapters/{name}/canary", json={"version": 2, "weight": 0.25}))
    Traffic(server, name).send(128 * MORE, tokens=16)
    trial = report(server, name)["canary"]
    assert trial and trial["verdict"] != "worse", trial
    assert server.adapter(name)["canary"], "nothing was done about it"


def test_a_version_that_is_a_quarter_slower_is_sent_away(slowable, adapters, tmp_path):
    """Its tokens are held back at the engine's edge (tests.support.slowed): in a batch every step is everybody's."""
    name = "quarter-slower"
    done(slowable.upload(name, adapters["alpha"]))
    weaker = variant(adapters["alpha"], tmp_path / "weaker", scale=0.99)
    slow = slowable.data.with_name("slow")
    slow.write_text(done(slowable.upload(name, weaker, promote=False))["id"])
    done(slowable.http.post(f"/v1/adapters/{name}/canary", json={"version": 2, "weight": 0.5}))
    sent_away(slowable, name, Traffic(slowable, name), "latency", tokens=12)
    (check,) = [one for one in evidence(slowable, name)["checks"] if one["check"] == "inter_token"]
    assert check["effect"] > 1.0  # of a few requests, on a machine that does other things too


def sent_away(server, name, traffic, reason, *, most=None, tokens=16):
    """Under traffic, v2 gets none any more: for this reason, with the evidence in history, audit log and metrics."""
    for _ in range(20):
        traffic.send(32, tokens=tokens)
        # The watcher looks at the last of them a second later.
        if eventually(lambda: server.adapter(name)["canary"] is None):
            break
    shown = server.adapter(name)
    # As text: pytest cuts a dict after some words.
    assert shown["canary"] is None and shown["live"] == 1, json.dumps(report(server, name)["canary"], indent=1)
    last = shown["history"][-1]
    assert (last["who"], last["what"]) == ("wayback", "canary_end") and last["why"].startswith(reason), last
    lines = [json.loads(line) for line in (server.data / "audit.jsonl").read_text().splitlines()]
    mine = [line for line in lines if line["subject"] == f"{name}@v2" and line["who"] == "wayback"]
    assert [(line["what"], line["reason"]) for line in mine] == [("canary_ended", reason)]
    time.sleep(1.1)
    assert series(server, "loradock_rollbacks_total", adapter=name, version="v2", reason=reason) == [1.0]
    used = sum(series(server, "loradock_requests_total", adapter=name, version="v2", code="200"))
    print(f"{name}: sent away for {reason} after {used:.0f} of its answers")
    assert most is None or used <= most, "and those under way"


def evidence(server, name):
    why = server.adapter(name)["history"][-1]["why"]
    return json.loads(why.partition(": ")[2])
