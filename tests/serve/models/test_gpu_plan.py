"""What is planned for a GPU is vLLM's own arithmetic, from anywhere and offline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from typer.testing import CliRunner

from serve.cli.main import app
from serve.errors import ConfigError
from serve.models import gpu_plan, gpus, hardware
from serve.models.dimensions import KNOWN, dimensions
from serve.models.gpu_plan import CARDS, parse, plan, smallest
from tests.support import gguf_files
from tests.support.nvml import Device, Nvml
from tests.support.vllm_sizes import AVAILABLE, MODELS, RANK, folder

ROOT = Path(__file__).parents[3]
GIB = 1 << 30
SIX = ("l4", "a10", "a100-40", "a100-80", "h100", "h200")


@cache
def vllm(what):
    """vLLM's own, from a process of its own: it takes its sizes from global state."""
    environ = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.support.vllm_sizes", what]
    told = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert told.returncode == 0, told.stderr[-3000:]
    return json.loads(told.stdout.splitlines()[-1])


@pytest.mark.parametrize("card", SIX)
@pytest.mark.parametrize("name", MODELS)
def test_vllms_own_sizes_of_four_models_on_six_cards_agree_within_five_percent(name, card):
    """On as few cards as it takes, and on all numbers above: vLLM's layers, slots and KV cache, without a device."""
    least = smallest(name, KNOWN[name], CARDS[card], rank=RANK)
    assert least is not None
    compared = 0
    for theirs in vllm("sizes"):
        if theirs["model"] != name or theirs["gpus"] < least:
            continue
        ours = plan(name, KNOWN[name], CARDS[card], theirs["gpus"], rank=RANK)
        assert ours.weights == pytest.approx(theirs["weights"], rel=0.01)
        assert ours.slots / ours.max_loras == pytest.approx(theirs["slot"], rel=0.01)
        # vLLM's request of the card, less what it holds there; what it measures of activations is ours.
        left = 0.92 * CARDS[card].total - theirs["weights"] - ours.max_loras * theirs["slot"] - ours.activations
        assert ours.tokens == pytest.approx(theirs["tokens"] * left / AVAILABLE, rel=0.05), theirs["gpus"]
        compared += 1
    assert compared == len([gpus for gpus in (1, 2, 4, 8) if gpus >= least])


def test_vllms_cuda_platform_takes_what_is_planned_with():
    """Over a stub of NVIDIA's library: no device, no driver."""
    for theirs in vllm("platform"):
        card = CARDS[theirs["card"]]
        assert theirs["platform"] == "NvmlCudaPlatform"
        assert (theirs["tokens"], theirs["sequences"]) == gpu_plan.batch(card)
        assert (theirs["block"], theirs["utilization"]) == (gpu_plan.BLOCK, gpu_plan.WHOLE)


@pytest.mark.parametrize(
    ("card", "gpus", "executor", "slots"),
    [
        ("h100", 1, "UniProcExecutor", 32),
        ("h100", 2, "MultiprocExecutor", 32),
        ("a10", 1, "UniProcExecutor", 8),
        ("a100-80", 1, "UniProcExecutor", 32),
    ],
)
def test_from_a_models_name_alone_an_engine_is_configured_for_the_card(card, gpus, executor, slots):
    """Our defaults through vLLM's own parser and its CUDA platform, as far as the first tensor on a device."""
    (theirs,) = (each for each in vllm("platform") if (each["card"], each["gpus"]) == (card, gpus))
    assert theirs["executor"] == executor and theirs["method"] == "spawn"
    assert theirs["worker"] == "vllm.v1.worker.gpu_worker.Worker" and theirs["second_runner"]
    assert theirs["extension"] == "serve.vllm_backend.worker_extension.Worker"
    assert (theirs["slots"], theirs["in_memory"], theirs["rank"], theirs["policy"]) == (slots, 32, 16, "priority")
    assert theirs["graphs"] == "FULL_AND_PIECEWISE"
    assert theirs["captured"][:4] == [1, 2, 4, 8] and theirs["captured"][-1] == 512
    assert theirs["lora_cases"] == [0, slots + 1], "each graph with adapters and without, and no more"


@pytest.mark.parametrize("name", MODELS)
def test_a_config_file_says_what_the_table_says(name):
    assert dimensions(folder(name)) == dimensions(f"org/{name}")


@pytest.mark.parametrize(("named", "title", "many"), [("h100", "H100", 1), ("2xH100", "H100", 2), ("8xl4", "L4", 8)])
def test_cards_are_named_as_people_name_them(named, title, many):
    card, count = parse(named)
    assert title in card.name and count == many


@pytest.mark.parametrize("wrong", ["h1000", "0xh100", "9xh100", "h100x2", ""])
def test_a_card_that_is_not_known_is_a_sentence(wrong):
    with pytest.raises(ConfigError, match="--gpu takes one of t4, a10, .*2xh100"):
        parse(wrong)


def told(*words):
    return CliRunner().invoke(app, ["plan", *words])


def test_the_command_that_starts_it_bounds_the_context_where_the_card_does():
    roomy, narrow = (told("meta-llama/Llama-3.1-8B-Instruct", "--gpu", card) for card in ("h100", "l4"))
    assert roomy.exit_code == narrow.exit_code == 0
    start = "loradock serve meta-llama/Llama-3.1-8B-Instruct --max-loras"
    assert roomy.stdout.splitlines()[-1] == f"{start} 32 --max-lora-rank 16"
    assert narrow.stdout.splitlines()[-1].startswith(f"{start} 8 --max-lora-rank 16 --max-model-len 2")


def test_what_does_not_fit_says_on_how_many_it_would():
    answer = told("meta-llama/Llama-3.3-70B-Instruct", "--gpu", "a100-80", "--json")
    assert answer.exit_code == 1
    sizes = json.loads(answer.stdout)
    assert (sizes["fits"], sizes["least_gpus"], sizes["command"]) == (False, 2, "")
    assert "eight of them are too few" in told("meta-llama/Llama-3.3-70B-Instruct", "--gpu", "t4").stdout


def test_a_model_that_nobody_knows_is_a_sentence():
    with pytest.raises(ConfigError, match="sizes are not known here: take a directory, or one of Llama-3.1-8B"):
        dimensions("somebody/unknown")
    with pytest.raises(ConfigError, match="40 heads of attention, which 3 GPUs do not divide"):
        plan("q", KNOWN["Qwen3-14B"], CARDS["h100"], 3, rank=16)


def test_on_a_machine_with_a_gpu_its_memory_is_spoken_of(monkeypatch):
    monkeypatch.setattr(hardware, "on_cpu", lambda: False)
    monkeypatch.setattr(gpus, "_library", lambda: Nvml([Device("NVIDIA H100 80GB HBM3", 79.1, 79, "GPU-a")]))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    here, named = told("Qwen/Qwen3-14B", "--json"), told("Qwen/Qwen3-14B", "--gpu", "h100", "--json")
    assert json.loads(here.stdout)["tokens"] == json.loads(named.stdout)["tokens"] > 100_000


def test_a_gguf_file_is_planned_for_by_its_header(tmp_path):
    file = gguf_files.write(tmp_path / "a.gguf", "qwen2", "Q4_K")
    done = CliRunner().invoke(app, ["plan", str(file), "--gpu", "h100", "--json"])
    planned = json.loads(done.stdout)
    assert done.exit_code == 0 and planned["fits"]
    assert planned["weights"] == dimensions(str(file)).weights()
    assert planned["command"].startswith(f"loradock serve {file}")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.gguf"]  # nothing was converted
