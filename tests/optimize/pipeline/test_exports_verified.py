"""Ten exports, each measured anew by `optimize verify`: every figure of the manifest comes again. Two are others'."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from optimize.checkpoint.checkpoint import Checkpoint
from optimize.data import text
from optimize.options import Evaluate
from tests.optimize.conftest import Adapter
from tests.optimize.pipeline.test_verify import command, results, verified
from tests.support.foreign import exports

# name -> a recipe, and whether the figures are those of steps too, which are carried out again for that
OURS = {
    "8 bits, smoothed, its adapter rewritten": ("steps: [{quantize: {scheme: w8a8, smooth: true}}]", False),
    "4 bits by AWQ and GPTQ": ("steps: [{quantize: {scheme: w4a16, method: awq-gptq}}]", False),
    "4 bits in GPTQ's format": ("steps: [{quantize: {scheme: w4a16, format: gptq}}]", False),
    "4 and 8 bits": ("steps: [{quantize: {scheme: w4a16, budget: 0.05}}]", False),
    "a smaller vocabulary": ("steps: [{prune: {vocabulary: used}}]", False),
    "zeros": ("steps: [{prune: {pattern: 2:4}}]", False),
    "two adapters in one": (
        "steps: [{combine: {adapters: [tone, other], name: both}}]\nexport: {format: adapter}", False,
    ),
    "fewer layers, healed": ("steps: [{prune: {layers: 1}}, {heal: {steps: 4, batch: 2, tokens: 24, rank: 2}}]", True),
}  # fmt: skip
WITHOUT_ADAPTERS = ("fewer layers, healed",)


@pytest.mark.parametrize("name", OURS)
def test_each_figure_of_an_export_is_measured_again(
    name, written, adapter, texts, base, tmp_path, steps_here, capsys
) -> None:
    recipe, rebuilt = OURS[name]
    names = {} if name in WITHOUT_ADAPTERS else {"tone": adapter(seed=1), "other": adapter(seed=2)}
    named = ", ".join(f"{key}: {folder}" for key, folder in names.items())
    out = tmp_path / "out"
    command(written(f"adapters: {{{named}}}\n{recipe}\ngate: {{max_size: 2}}\n"), "--out", out)
    words: list[str | Path] = [out, "--model", base, "--data", texts["evaluation"].parent]
    words += [word for key, folder in names.items() for word in ("--adapter", f"{key}={folder}")]
    found = verified(capsys, *words, *(["--rebuild"] if rebuilt else []))
    again = results(found)
    assert found["verified"] and len(again) >= 8
    assert set(again.values()) == {"same"}, again


def theirs(model: Path, windows: torch.Tensor) -> float:
    """Perplexity by transformers alone."""
    from transformers import AutoModelForCausalLM

    read = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.inference_mode():
        said = read(input_ids=windows).logits.log_softmax(-1)[:, :-1]
    return math.exp(-float(said.gather(-1, windows[:, 1:, None]).mean()))


@pytest.mark.parametrize("maker", ["llm-compressor", "PEFT"])
def test_what_others_claim_of_their_exports_is_measured(
    maker, adapter: Adapter, base: Path, texts: dict[str, Path], tmp_path: Path, steps_here: None, capsys: Any
) -> None:
    """Their perplexity is transformers' own, and a wrong one is found."""
    from transformers import AutoTokenizer

    folder = tmp_path / "theirs"
    if maker == "PEFT":
        exports.peft_merged(base, adapter(seed=1), folder)
        measured = folder
    else:
        right = exports.llm_compressor(base, folder)
        measured = decompressed(base, right, tmp_path / "dense")
    part = Evaluate(text=str(texts["evaluation"]), samples=8, tokens=48)
    windows = text.windows(AutoTokenizer.from_pretrained(base), text.documents(part, True), 8, 48, 0)
    claims = {"perplexity": theirs(measured, torch.tensor(windows)), "bytes": Checkpoint(folder).bytes}
    on = [f"evaluate.text={texts['evaluation']}", "evaluate.samples=8", "evaluate.tokens=48", "evaluate.engine=false"]
    words = [folder, "--model", base, *(word for setting in on for word in ("--set", setting))]
    expected = [word for name, value in claims.items() for word in ("--expect", f"{name}={value}")]
    again = results(verified(capsys, *words, *expected))
    assert again["perplexity"] in ("same", "close") and again["bytes"] == "same"
    wrong = results(verified(capsys, *words, "--expect", f"perplexity={1.02 * claims['perplexity']}", expect=3))
    assert wrong["perplexity"] == "differs"


def decompressed(base: Path, right: dict[str, torch.Tensor], folder: Path) -> Path:
    """The base with the weights `right`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.load_state_dict(right, strict=False)
    model.save_pretrained(folder)
    return folder
