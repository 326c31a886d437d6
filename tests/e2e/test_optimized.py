"""The real model made smaller, and the server on it: what it is shows, and adapters of the old base answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.server import SMALL, Server, loradock

pytestmark = pytest.mark.engine

# To the nearest and on little text: what GPTQ adds is proved on small models.
QUICK = ("--set", "evaluate.engine=false", "--set", "evaluate.samples=4", "--set", "evaluate.prompts=[]")
STEP = "steps=[{quantize: {scheme: w8a8, method: rtn}}]"
GATE = (
    "--set",
    "gate.max_perplexity_increase=0.06",
    "--set",
    "gate.min_top1=0.85",
    "--set",
    "gate.max_adapter_kl=null",
)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("optimized") / "smollm2-int8"
    done = loradock("optimize", "int8-cpu", "--out", out, "--set", STEP, *QUICK, *GATE, timeout=420)
    assert done.returncode == 0, done.stderr
    return out


def test_a_quantized_base_serves_shows_its_manifest_and_takes_adapters_of_the_original(export, adapters, tmp_path):
    manifest = json.loads((export / "manifest.json").read_text())
    assert manifest["scores"]["size_ratio"] < 0.62
    with Server(tmp_path / "data", tmp_path / "log", *SMALL, model=str(export)) as server:
        (card,) = server.http.get("/v1/models").json()["data"]
        assert card["manifest"]["key"] == manifest["key"]
        assert "int8" in card["weights"] or "vLLM's layers" in card["weights"]
        assert card["manifest"]["scores"]["perplexity"] == manifest["scores"]["perplexity"]
        assert server.http.get("/version").json()["manifest"]["gate_passed"] is True
        base = server.ask("smollm2-int8")
        assert base.done and base.text and base.word is None
        for word in ("alpha", "bravo"):
            server.upload(word, adapters[word]).raise_for_status()
            assert server.ask(word).word == word
        assert server.ask("smollm2-int8").text == base.text
