"""optimum loads our exports and exports for us, in an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from optimize import cli, recipe
from optimize.checkpoint.model import adapted
from optimize.errors import OptimizeError, Refused
from optimize.export import layout, onnx, optimum
from optimize.export.session import Session
from optimize.job import Job
from optimize.options import Evaluate, Text
from optimize.pipeline import plan
from tests.optimize.conftest import silent
from tests.support import families

# Not tied: a tiny tied model says the last token again.
GEMMA = {"tie_word_embeddings": False, "layer_types": families.ALTERNATING[:2]}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.5] * 16, "long_factor": [4.0] * 16,
    "original_max_position_embeddings": 96,
}  # fmt: skip
PROMPT, TOKENS = list(range(3, 23)), 64
# Windows are of 8 tokens. Qwen3's heads are wider than hidden_size / heads, as those of its small models are, and Phi-3
# has fewer heads of keys and values than others: optimum's class makes an empty cache of other shapes there.
EXPORTED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Llama": ("transformers", "fp32", {}),
    "Qwen3": ("transformers", "fp32", {"head_dim": 64}),
    "Mistral": ("transformers", "fp32", {}),
    "Gemma 3": ("transformers", "fp32", GEMMA),
    "Phi-3, Phi-4": ("transformers", "fp32", {"rope_parameters": {**LONGROPE}, "original_max_position_embeddings": 96}),
    "Gemma 3, optimum": ("optimum", "fp32", {**GEMMA, "head_dim": 256}),
    "Mistral, optimum": ("optimum", "int8", {}),
}
ASK = """
import json, sys
import torch
from optimum.onnxruntime import ORTConfig, ORTModelForCausalLM
from transformers import AutoTokenizer, pipeline

said = {}
prompt, count, *folders = json.loads(sys.argv[1])
for folder in folders:
    model = ORTModelForCausalLM.from_pretrained(folder)
    model.generation_config.eos_token_id = None
    made = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False)
    said[folder] = made[0, len(prompt):].tolist()
    assert ORTConfig.from_pretrained(folder).one_external_file
piped = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(folder))
said["piped"] = piped("w1 w2", max_new_tokens=4)[0]["generated_text"]
print(json.dumps(said))
"""


@pytest.fixture(scope="module", autouse=True)
def words_of_any_model() -> Any:
    """transformers takes no tokenizer but Qwen's own for Qwen3."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AutoTokenizer, "from_pretrained", PreTrainedTokenizerFast.from_pretrained)
        yield


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path, dict[str, Any]]]:
    """Base, export and its notes, by name; each has the adapter `one`."""
    optimum.set_up()
    made = {}
    for name, (exporter, precision, more) in EXPORTED.items():
        folder = tmp_path_factory.mktemp("family")
        base = families.written(name.removesuffix(", optimum"), folder / "base", num_hidden_layers=2, **more)
        families.adapter(base, folder / "one")
        options = {"format": "onnx", "precision": precision, "exporter": exporter}
        adapters = {"one": str(folder / "one")}
        job = Job(
            kind="onnx", options=options, model=str(base), base=str(base), reference=str(base), adapters=adapters,
            originals=adapters, calibration=Text(), evaluate=Evaluate(), seed=0, target="cpu", out=str(folder),
        )  # fmt: skip
        made[name] = base, folder / "model", onnx.run(job, silent)
    return made


def greedy(base: Path, adapter: Path | None = None) -> list[int]:
    """PyTorch's answer."""
    from transformers import AutoModelForCausalLM

    asked = {"max_new_tokens": TOKENS, "do_sample": False}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    if adapter is None:
        return model.generate(torch.tensor([PROMPT]), **asked)[0, len(PROMPT) :].tolist()
    with adapted(model, adapter) as both:
        return both.generate(input_ids=torch.tensor([PROMPT]), **asked)[0, len(PROMPT) :].tolist()


def test_optimums_class_answers_as_pytorch_does_from_every_export(exports):
    folders = [str(folder) for _, folder, _ in exports.values()]
    command = [sys.executable, "-P", "-c", ASK, json.dumps([PROMPT, TOKENS, *folders])]
    done = subprocess.run(command, env={**os.environ, **optimum.environment()}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    for name, (base, folder, notes) in exports.items():
        if notes["precision"] == "fp32":
            assert said[str(folder)] == greedy(base) and len(set(said[str(folder)])) > 8, name
        else:  # what the rounded weights answer, as our own session says it
            assert said[str(folder)] == list(Session(folder).tokens(PROMPT, TOKENS)), name
    assert said["piped"].startswith("w1 w2 ")


def test_an_adapter_beside_the_graph_answers_as_pytorch_does_with_it(exports):
    for name, (base, folder, notes) in exports.items():
        assert set(notes["checked"]) == {"base", "one"} and notes.get("validation", []) == []
        if notes["precision"] == "fp32":
            with_adapter = list(Session(folder, "one").tokens(PROMPT, TOKENS))
            assert with_adapter == greedy(base, base.parent / "one") != greedy(base), name
        else:
            assert 0 < notes["logits_off"] < 1
    with pytest.raises(Refused, match="has no adapter 'two': it has one"):
        Session(folder, "two")


def test_the_exports_say_nothing_of_the_machine_that_made_them(exports):
    for name, (_, folder, _) in exports.items():
        assert b"site-packages" not in (folder / "model.onnx").read_bytes(), name
        written = {file.name for file in folder.iterdir()}
        assert {"config.json", "generation_config.json", "ort_config.json", "tokenizer.json"} <= written


def test_what_optimum_does_not_export_is_refused_before_any_work(tmp_path, monkeypatch):
    optimum.set_up()
    base = families.written("Mixtral", tmp_path / "base")
    written = f"model: {base}\nexport: {{format: onnx, exporter: optimum}}\nevaluate: {{engine: false}}\n"
    read = recipe.parse(written, tmp_path)
    with pytest.raises(Refused, match="optimum's exporter does not take models of type 'mixtral'"):
        plan.made(read, base, {}, tmp_path / "out", 10**12)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(Refused, match="run `loradock optimize setup-optimum` once"):
        plan.made(read, base, {}, tmp_path / "out", 10**12)


def test_a_setup_that_fails_says_why_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    wrong = tmp_path / "optimum.txt"
    wrong.write_text("optimum==2.1.0 --hash=sha256:" + "0" * 64 + "\n")
    monkeypatch.setattr(optimum, "REQUIREMENTS", wrong)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(OptimizeError, match="pip failed with exit code 1: .*optimum"):
        optimum.set_up()
    assert list((tmp_path / "cache/loradock/optimum").iterdir()) == []


def test_setup_optimum_is_done_once(capsys):
    for _ in range(2):
        assert cli.run(["setup-optimum"], lambda name: Path(name)) == 0
        assert f"its packages are in {optimum.home()}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "old"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {"rope_theta": 5e5, "rope_scaling": None}),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}},
            {"rope_theta": 1e4, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        ),
        (
            {
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                }
            },
            {
                "rope_local_base_freq": 1e4,
                "rope_theta": 1e6,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
        ),
        ({"rope_theta": 7.0}, {"rope_theta": 7.0}),
        (
            {"model_type": "phi3", "rope_parameters": LONGROPE},
            {
                "model_type": "phi3",
                "rope_theta": 1e4,
                "original_max_position_embeddings": 96,
                "rope_scaling": {"type": "longrope", "short_factor": [1.5] * 16, "long_factor": [4.0] * 16},
            },
        ),
    ],
)
def test_a_config_of_transformers_5_is_written_as_4_reads_it(config, old):
    assert layout.legacy({"model_type": "llama", **config}) == {"model_type": "llama", **old}


def test_longrope_is_exact_as_far_as_its_short_factors_and_refused_beyond(exports):
    _, folder, _ = exports["Phi-3, Phi-4"]
    assert json.loads((folder / "config.json").read_text())["original_max_position_embeddings"] == 96
    session = Session(folder)
    with pytest.raises(Refused, match="takes 96 tokens of prompt and answer, and these are 97"):
        session.logits(torch.ones(1, 97, dtype=torch.long))


def test_a_rope_that_changes_with_the_length_is_refused_before_any_work(tmp_path):
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    base = families.written("Qwen3", tmp_path / "base", rope_parameters=dynamic)
    read = recipe.parse(f"model: {base}\nexport: {{format: onnx}}\nevaluate: {{engine: false}}\n", tmp_path)
    with pytest.raises(Refused, match="rope changes with the length of the text"):
        plan.made(read, base, {}, tmp_path / "out", 10**12)


def test_a_tokenizer_of_transformers_5_is_written_as_4_reads_it():
    new = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<a>"]}
    old = {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["<a>"]}
    assert layout.legacy_tokenizer(new) == old == layout.legacy_tokenizer(old)
