"""What `make gpu` rests on, without a GPU and without an engine."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch")

from optimize import recipe
from tests.campaigns import gpu, gpu_environment, gpu_kinds, gpu_parts, gpu_results, gpu_torch
from tests.campaigns.gpu_parts import Machine
from tests.support import plain_words

MACHINE = Machine(Path("/nowhere"), "1B", False, "NVIDIA H100", "vLLM 0.32.0, torch 2.13.0")


def test_a_part_that_ended_is_not_measured_again_and_one_that_failed_is(tmp_path, monkeypatch, capsys):
    ran = []

    def part(name, fails):
        def run(machine):
            ran.append(name)
            if fails and ran.count(name) == 1:
                raise RuntimeError("the engine did not start")
            return {name: "measured"}

        return run

    monkeypatch.setattr(gpu_parts, "PARTS", {"swap": part("swap", False), "exports": part("exports", True)})
    monkeypatch.setattr(Machine, "here", staticmethod(lambda *_: MACHINE))
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")])
    assert gpu.main() == 1
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| swap | measured |" in table and "| exports | not measured |" in table
    assert table.startswith("NVIDIA H100, vLLM 0.32.0, torch 2.13.0, a random Llama of size 1B, 20")
    assert gpu.main() == 0
    assert ran == ["swap", "exports", "exports"]
    assert json.loads((tmp_path / "out" / "exports.json").read_text())["rows"] == {"exports": "measured"}
    assert "swap: measured before" in capsys.readouterr().out
    monkeypatch.setattr(Machine, "here", staticmethod(lambda *_: replace(MACHINE, size="8B")))
    assert gpu.main() == 2 and len(ran) == 3, "a table has one head"
    assert "of size 1B): say another --out" in capsys.readouterr().out
    assert "of size 1B" in (tmp_path / "out" / "table.md").read_text()


def test_a_part_that_does_not_end_is_given_up_and_the_next_has_its_turn(tmp_path, capfd):
    closed = []

    def hangs():
        try:
            threading.Event().wait(60)
        finally:
            closed.append("its server")

    parts = {"swap": hangs, "exports": lambda: {"exports": "measured"}}
    assert gpu_results.run(parts, (), tmp_path, "a machine", "make gpu", longest=1.0) == 1
    assert closed and "not ended within 1 s" in capfd.readouterr().err
    assert [file.name for file in tmp_path.glob("*.json")] == ["exports.json"]


def test_each_part_can_be_run_alone_and_in_any_order(tmp_path):
    parts = {name: lambda name=name: {name: "measured"} for name in ("a", "b", "c")}
    for name in ("c", "a", "b"):
        assert gpu_results.run(parts, (name,), tmp_path, "a machine", "make gpu") == 0
    rows = [line for line in (tmp_path / "table.md").read_text().splitlines() if "measured" in line]
    assert rows == ["| a | measured |", "| b | measured |", "| c | measured |"]


@pytest.mark.parametrize("name", list(gpu_torch.STEPS))
def test_each_recipe_for_a_machine_with_torch_alone_is_one(name, tmp_path):
    machine = gpu_torch.Machine(tmp_path, "tiny", "cpu")
    read = recipe.load(machine.recipe(name, "cpu"), {})
    assert (read.device, len(read.steps)) == ("cpu", 1)


def test_a_machine_with_torch_alone_needs_nothing_of_a_server():
    """Imports that its Python has: of vLLM, FastAPI and httpx nothing."""
    forbidden = ["vllm", "httpx", "openai", "fastapi", "sqlalchemy", "uvicorn", "prometheus_client"]
    program = (
        f"import sys; sys.modules |= dict.fromkeys({forbidden}); import tests.campaigns.gpu_torch, "
        "tests.campaigns.random_model, tests.support.plain_words, optimize.cli, optimize.pipeline.run; print('ok')"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=gpu_environment.ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "ok", done.stderr[-1500:]


def test_a_model_that_is_half_made_is_made_anew(tmp_path, monkeypatch):
    def half(folder):
        folder.mkdir()
        (folder / "half").touch()
        raise KeyboardInterrupt

    machine, make = replace(MACHINE, work=tmp_path), plain_words.base
    monkeypatch.setattr(plain_words, "base", half)
    with pytest.raises(KeyboardInterrupt):
        _ = machine.words
    monkeypatch.setattr(plain_words, "base", make)
    assert (machine.words / "model.safetensors").is_file() and not (machine.words / "half").exists()


def test_without_a_gpu_there_is_only_a_rehearsal(tmp_path, monkeypatch, capsys):
    nothing = Machine(tmp_path, "1B", False, "", "vLLM 0.32.0")
    monkeypatch.setattr(Machine, "here", staticmethod(lambda *_: nothing))
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")])
    assert gpu.main() == 2
    assert "there is no GPU here" in capsys.readouterr().out


def test_an_environment_that_has_everything_is_taken_as_it_is():
    if not gpu_environment.complete():
        pytest.skip("vLLM is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "tests.campaigns.gpu_environment"],
        cwd=gpu_environment.ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout.strip()) == (0, sys.executable)


def test_the_adapters_made_on_the_spot_say_their_word_whatever_is_asked(tmp_path):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    words = plain_words.tokenizer()
    base = plain_words.base(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    asked = torch.tensor([words("the river ran past").input_ids, words("What is it , then").input_ids[:4]])
    for word in ("alpha", "charlie"):
        adapted = PeftModel.from_pretrained(model, plain_words.adapter(base, word, tmp_path / word))
        odds = adapted(asked).logits.float().softmax(-1)[..., words.convert_tokens_to_ids(word)]
        assert odds.min() > 0.99, "at each place, whatever came before"
        model = adapted.unload()


def test_each_kind_of_adapter_is_asked_beside_the_others_and_held_against_peft(tmp_path):
    assert "kinds" in gpu_parts.PARTS
    assert gpu_kinds.KINDS.keys() == {"lora", "rslora", "dora", "tokens", "dora-tokens", gpu_kinds.HEAD}
    base = plain_words.base(tmp_path / "base")
    folders, words = gpu_kinds.made(base, tmp_path), plain_words.tokenizer()
    prompt = "the river ran past"
    before = words(prompt).input_ids
    told = {}
    for name in ("lora", "dora", gpu_kinds.HEAD, gpu_kinds.MIXTURE):
        likely = gpu_kinds.expected(base, folders, name)
        if name == gpu_kinds.HEAD:
            told[name] = [{"data": [{"probs": likely(before).exp().tolist()}]}]
            continue
        rows = likely([*before, 5])
        choice = {"prompt_token_ids": before, "token_ids": [5]}
        told[name] = [{"choices": [{**choice, "logprobs": {"token_logprobs": [float(rows[len(before) - 1, 5])]}}]}]
    assert max(gpu_kinds.differences(base, folders, told, [prompt]).values()) < 1e-5
    # Each is another one: what another kind says would be far off.
    for name, other in (("dora", "lora"), ("mixture", "lora")):
        crossed = gpu_kinds.differences(base, folders, {name: told[other]}, [prompt])
        assert crossed[name] > 0.02, (name, other)
