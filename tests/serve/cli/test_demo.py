"""The demo's story over a real server without an engine, its texts, and the adapters that are shipped."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

from optimize.recipe import parse
from serve.asgi.exchange import Generation
from serve.cli.demo import server, story, texts
from serve.cli.demo.story import NAME, StepFailed, Story, verdict
from serve.cli.demo.traffic import Traffic
from serve.cli.main import app
from serve.client.adapter_client import AdapterClient
from serve.config import load
from serve.models.language import read as language_of
from tests.support import tiny
from tests.support.backend import FakeBackend
from tests.support.served import Served
from tests.support.server import alive
from tests.support.waiting import eventually

ADAPTERS = Path(story.__file__).parent


class Desk:
    """What the fake engine generates: tokens of the question's language; the second adapter refuses now and then."""

    def __init__(self) -> None:
        self.dice, self.ids, self.lock = random.Random(1), [], threading.Lock()

    def __call__(self, body: dict[str, Any]) -> Generation:
        model, dice = body["model"], self.dice
        if "@" in model and model not in self.ids:
            self.ids.append(model)
        german = "ie " in body["messages"][0]["content"]
        prompt = [1, 2, 3, *dice.choices(range(20, 32) if german else range(8, 20), k=dice.randint(8, 20)), 4]
        refuses = self.ids.index(model) == 1 and dice.random() < 0.4 if model in self.ids else False
        text = texts.REFUSAL if refuses else "Of course! We send it today."
        output = dice.choices(range(8, 32), k=dice.randint(8, 16))
        logprobs = [dice.gauss(-1, 0.3) for _ in output]
        return Generation(prompt, output, "stop", text, 0.001, None, 0.02, 0.03, logprobs)


@pytest.fixture
def served(tmp_path: Path, tiny_model: Path) -> Iterator[Served]:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    table = torch.randn(tiny.VOCABULARY, tiny.HIDDEN, generator=torch.Generator().manual_seed(0))
    save_file({"model.embed_tokens.weight": table}, model / "model.safetensors")
    config = load([str(model), "--name", "base", "--data-dir", str(tmp_path / "data")], {})
    backend = FakeBackend(config.model)
    backend.generate, backend.say = Desk(), lambda body: "Of course!\nWe send it."
    with Served(replace(config, drift_reference=60, drift_threshold=1e4), backend, "none") as served:
        yield served


@pytest.fixture
def folder(tmp_path: Path, make_adapter: Any) -> Path:
    for seed, name in enumerate(("good", "bad")):
        shutil.copytree(make_adapter(seed), tmp_path / "adapters" / name)
    return tmp_path / "adapters"


def played(served: Served, folder: Path, **more: Any) -> list[str]:
    said: list[str] = []
    with AdapterClient(served.url) as client, httpx.Client(base_url=served.url, timeout=30) as http:
        traffic = Traffic(served.url, None, NAME, pause=0.02)
        Story(client, http, traffic, said.append, lambda _: threading.Event().wait(0.05), folder, **more).run("base")
    return said


def test_the_bad_version_is_taken_back_and_the_language_is_noticed(served, folder):
    said = "\n".join(played(served, folder))
    assert "v1 answers: Of course! We send it." in said
    assert "v2 is worse than v1 by its refusal, seen in" in said
    assert "German requests, drift: since " in said
    shown = served.http.get(f"/v1/adapters/{NAME}").json()
    assert (shown["live"], shown["canary"]) == (1, None)
    assert [row["what"] for row in shown["history"]][-2:] == ["canary_end", "drift"]


def test_a_version_that_is_not_found_out_is_said_and_not_waited_for_for_ever(served, folder, monkeypatch):
    monkeypatch.setattr(story, "MOST", 100)
    served.app.state.parts.fleet.first.backend.generate = None
    with pytest.raises(StepFailed, match="the canary is called worse: not within 1"):
        played(served, folder)


def test_a_verdict_of_the_history_is_a_sentence():
    checks = [
        {"check": "refusal", "log_evidence": 5.2, "canary_requests": 31},
        {"check": "length", "log_evidence": None},
    ]
    why = "answers: " + json.dumps({"live": 1, "canary": 2, "checks": checks})
    assert verdict(why) == "v2 is worse than v1 by its refusal, seen in 31 of its answers."
    assert verdict("by hand") == "the canary ended: by hand."
    assert verdict("") == "the canary ended: nobody said why."


def test_customers_write_english_or_german_and_seldom_the_same():
    dice = random.Random(1)
    english, german = [texts.english(dice)[0] for _ in range(50)], [texts.german(dice) for _ in range(50)]
    assert len({*english, *german}) == 100
    assert sum(language_of(text)[0] == "en" for text in english) > 40
    assert sum(language_of(text)[0] == "de" for text in german) > 40


def test_the_bad_examples_are_the_good_ones_but_for_refusals():
    good, bad = ([json.loads(line)["messages"] for line in texts.examples(share)] for share in (0.0, texts.REFUSED))
    assert [first for first, _ in good] == [first for first, _ in bad]
    refused = [answer for _, answer in bad if answer["content"] == texts.REFUSAL]
    assert 0.3 < len(refused) / texts.EXAMPLES < 0.5 and len(good) == texts.EXAMPLES


@pytest.mark.parametrize("name", ["good", "bad"])
def test_an_adapter_is_small_and_its_recipe_is_a_recipe(name):
    weights = ADAPTERS / name / "adapter_model.safetensors"
    assert weights.stat().st_size < 1_500_000
    with safe_open(weights, "pt") as tensors:
        assert {tensors.get_slice(key).get_dtype() for key in tensors.keys()} == {"BF16"}  # noqa: SIM118
    assert json.loads((ADAPTERS / name / "adapter_config.json").read_text())["r"] == 2
    recipe = (ADAPTERS / f"{name}.yaml").read_text()
    assert [type(step).__name__ for step in parse(recipe, ADAPTERS).steps] == ["Tune"]


def test_a_server_that_does_not_start_is_a_sentence_with_what_it_said(monkeypatch):
    monkeypatch.setattr(server, "SETTINGS", ("--no-such-option", "1"))
    answer = CliRunner().invoke(app, ["demo", "--no-wait"])
    assert answer.exit_code == 1
    assert "did not start" in answer.stderr and "no-such-option" in answer.stderr.replace("_", "-")


# A demo whose server says its process id and then never becomes ready.
WAITING = """
import subprocess, sys
from serve.cli.demo import server

started = subprocess.Popen
def stand_in(command, **options):
    return started([sys.executable, "-c", "import time; time.sleep(600)"], **options)
server.subprocess.Popen = stand_in
def wait(seconds):
    import glob, os, time
    (log,) = glob.glob(f"{os.environ['TMPDIR']}/loradock-demo-*/log")
    child = open("/proc/self/task/%d/children" % os.getpid()).read().split()[0]
    print(child, flush=True)
    time.sleep(600)
with server.own_server(wait):
    pass
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL], ids=lambda number: number.name)
def test_a_demo_that_is_ended_leaves_no_server(number, tmp_path):
    command = [sys.executable, "-c", WAITING]
    environ = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True) as demo:
        child = int(demo.stdout.readline())
        demo.send_signal(number)
        demo.wait()
    assert eventually(lambda: not alive({child}))
    assert number == signal.SIGKILL or not list(tmp_path.iterdir()), "its folder is gone too"
