"""The quantized checkpoint is what compressed-tensors takes it for; smoothing only changes where numbers lie."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from optimize import processor
from optimize.checkpoint import artifact, checkpoint, formats
from optimize.checkpoint.checkpoint import Checkpoint
from optimize.checkpoint.model import Entered, adapted, logits, opened
from optimize.errors import OptimizeError
from optimize.steps.calibrated import CalibratedModel, first_readers, windows
from optimize.steps.quantize import channel_scales, gptq, kept, mixed, quantize
from optimize.steps.quantize.quantizer import Quantizer
from tests.optimize.conftest import silent

IDS = torch.arange(2, 34).view(2, 16)


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16", "w4a16", "fp8"])
def test_transformers_reads_the_checkpoint_as_we_do(scheme, base, job):
    """compressed-tensors' own loader, an implementation that is not ours, gives the same weights and logits."""
    from transformers import AutoModelForCausalLM

    made = job("quantize", scheme=scheme)
    notes = quantize.run(made, silent)
    assert notes["layers"] == {scheme: 21}
    folder = made.folder / "model"
    ours, theirs = opened(folder, torch.float32), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plain = opened(base, torch.float32)
    with torch.inference_mode():
        right = theirs(IDS).logits  # the first call decompresses
    for name, weight in ours.state_dict().items():
        assert torch.allclose(weight, theirs.state_dict()[name], rtol=1e-6, atol=1e-9), name
        assert "_proj" not in name or not torch.equal(weight, plain.state_dict()[name])
    if scheme != "w8a8":  # compressed-tensors divides activations by 127.5 where vLLM's kernels divide by 127
        off, moved = logits(ours, IDS) - right, logits(ours, IDS) - logits(plain, IDS)
        assert off.square().mean() < 1e-3 * moved.square().mean()


def test_a_w8a8_layer_computes_what_an_int8_kernel_computes(base, job):
    made = job("quantize")
    quantize.run(made, silent)
    folder, name = made.folder / "model", "model.layers.1.mlp.up_proj"
    x = torch.randn(5, 64) * 3
    scale = x.abs().amax(1, keepdim=True) / 127
    integers = (x / scale).round().to(torch.int32)
    weight = Checkpoint(folder).tensor(f"{name}.weight").to(torch.int32)
    exact = (integers @ weight.T).float() * scale * Checkpoint(folder).tensor(f"{name}.weight_scale").float().T
    ours = opened(folder, torch.float32).get_submodule(name)(x)
    assert torch.allclose(ours, exact, rtol=1e-5, atol=1e-5)


def test_each_scheme_takes_the_bytes_that_it_promises(base, job):
    whole = sum(e.bytes for n, e in Checkpoint(base).entries.items() if n.endswith("_proj.weight"))
    for scheme, share in (("w8a8", 0.5), ("w4a16", 0.25)):
        made = job("quantize", scheme=scheme, method="rtn", out=scheme)
        quantize.run(made, silent)
        entries = Checkpoint(made.folder / "model").entries
        packed = sum(e.bytes for n, e in entries.items() if n.endswith(("_proj.weight", "weight_packed")))
        assert packed == pytest.approx(whole * share)


def test_smoothing_moves_scales_and_changes_no_answer(base, job):
    made = job("quantize")
    factors = channel_scales.smoothing(CalibratedModel(base, windows(made)), silent).factors
    assert {float(factor.log2().frac().abs().max()) for factor in factors.values()} == {0.0}
    assert max(float(factor.max() / factor.min()) for factor in factors.values()) > 2
    before = logits(opened(base, torch.float32), IDS)
    subject = CalibratedModel(base, windows(made), dtype=torch.float32)
    for at in range(3):
        channel_scales.apply(subject, at, factors)
    assert torch.allclose(logits(subject.model, IDS), before, atol=1e-4)


def test_what_scaling_moves_is_measured_without_a_copy_of_the_model(base, job):
    """Of a model that is larger than the memory a layer at a time is scaled, and is as it is on disk again."""
    model = CalibratedModel(base, windows(job("quantize")))
    before = {name: weight.data_ptr() for name, weight in model.model.named_parameters()}
    factors = channel_scales.smoothing(model, silent).factors
    assert factors and channel_scales.moved(model, factors) < 0.01
    assert {name: weight.data_ptr() for name, weight in model.model.named_parameters()} == before


def test_an_adapter_is_rewritten_for_the_smoothed_base(base, job, adapter):
    """The smoothed base with the rewritten adapter answers as the base with the adapter did."""
    folder = adapter(target_modules=["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    made = job("quantize", adapters={"one": folder}, smooth=True)
    notes = quantize.run(made, silent)
    assert notes["adapters"] == {"one": "rewritten: smoothing folded in"}
    with adapted(opened(base, torch.float32), folder) as model:
        right = logits(model, IDS)
    new = opened(made.folder / "model", torch.float32)
    with adapted(new, made.folder / "adapters/one") as model:
        folded = (logits(model, IDS) - right).square().mean()
    with adapted(new, folder) as model:
        unchanged = (logits(model, IDS) - right).square().mean()
    assert folded < 0.3 * unchanged


@pytest.mark.parametrize("scheme", [{"scheme": "w8a8", "smooth": True}, {"scheme": "w4a16", "method": "awq-gptq"}])
def test_without_bfloat16_instructions_one_layer_is_copied_at_a_time(scheme, base, job, monkeypatch):
    """All weights were copied to float32, three times the memory; the bytes are those of a model that is whole."""
    monkeypatch.setattr(processor, "multiplies_bfloat16", lambda: False)
    real: set[str] = set()

    class Watched(CalibratedModel):
        def hessians(self, layer, readers, begun):
            weights = ((name, weight) for name, weight in self.model.named_parameters() if "_proj" in name)
            real.update(f"{layer} of {name.split('.')[2]}" for name, weight in weights if weight.stride() != (0, 0))
            return super().hessians(layer, readers, begun)

    monkeypatch.setattr(quantize, "CalibratedModel", Watched)
    by_layer = job("quantize", **scheme, out="by-layer")
    quantize.run(by_layer, silent)
    assert real == {"0 of 0", "1 of 1", "2 of 2"}
    monkeypatch.setattr(quantize, "CalibratedModel", lambda *given, by_layer: CalibratedModel(*given))
    whole = job("quantize", **scheme, out="whole")
    quantize.run(whole, silent)
    assert artifact.contents(by_layer.folder / "model") == artifact.contents(whole.folder / "model")


def test_adapters_that_are_named_keep_smoothing_out(base, job, adapter):
    made = job("quantize", adapters={"one": adapter()})
    notes = quantize.run(made, silent)
    assert (notes["smooth"], notes["adapters"]) == (False, {"one": "applies unchanged"})
    norm = "model.layers.0.input_layernorm.weight"
    assert torch.equal(Checkpoint(made.folder / "model").tensor(norm), Checkpoint(base).tensor(norm))


def test_a_budget_gives_bits_back_where_they_matter(base, job, monkeypatch):
    """With known effects: layer 0 cannot bear 4 bits, its down projection not 8 either, the others bear all."""
    from transformers import AutoModelForCausalLM

    def known(quantizer, levels, scales, partial):
        costs = {unit.label: {"w4a16": 0.001, "w8a8": 0.001} for unit in quantizer.model.units}
        for unit in quantizer.model.units[:4]:
            costs[unit.label] = {"w4a16": 0.5, "w8a8": 0.4 if unit.label == "0.down" else 0.002}
        return costs

    monkeypatch.setattr(mixed, "effects", known)
    losses = iter([3.0, 3.9, 3.015])  # of the original, with 4 bits everywhere, and of the mix
    monkeypatch.setattr(mixed, "mean_loss", lambda log_probabilities, ids: next(losses))
    made = job("quantize", scheme="w4a16", budget=0.02)
    notes = quantize.run(made, silent)
    assert notes["kept"] == {"0.q/k/v": "w8a8", "0.o": "w8a8", "0.gate/up": "w8a8", "0.down": "bf16"}
    folder = made.folder / "model"
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision" and "model.layers.0.mlp.down_proj" in config["ignore"]
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        theirs(IDS)
    for name, weight in opened(folder, torch.float32).state_dict().items():
        assert torch.allclose(weight, theirs.state_dict()[name], rtol=1e-6, atol=1e-9), name


@pytest.mark.parametrize(("scheme", "bits", "low"), [("w4a16", 5.5, 4.5), ("w8a8", 10.0, 8.0)])
def test_bits_a_weight_are_spent_where_they_matter(scheme, bits, low, base, job):
    made = job("quantize", scheme=scheme, method="rtn", smooth=False, bits=bits, group=32 if low == 4.5 else 0)
    notes = quantize.run(made, silent)
    assert low < notes["bits_taken"] <= bits and notes["kept"]
    entries = Checkpoint(made.folder / "model").entries
    taken = sum(
        entry.bytes for name, entry in entries.items()
        if "_proj.weight" in name and not name.endswith("weight_shape")
        and (scheme == "w4a16" or not name.endswith("weight_scale"))
    )  # fmt: skip
    weights = sum(e.bytes / 2 for name, e in Checkpoint(base).entries.items() if name.endswith("_proj.weight"))
    # Scales of 8-bit rows are not counted.
    assert 8 * taken / weights == pytest.approx(notes["bits_taken"], rel=0.06)
    costs = notes["sensitivity"]
    dearest = max(costs, key=lambda label: costs[label][scheme])
    assert dearest in notes["kept"]


def test_gptq_on_awqs_scales_loses_less_than_either_and_rewrites_adapters(base, job, adapter):
    """How far the answer is from the original's, over the calibration text."""
    ids = torch.tensor(windows(job("quantize", out="text")))
    right = logits(opened(base, torch.float32), ids)
    off, said = {}, {}
    for method in ("rtn", "awq", "gptaq", "awq-gptq"):
        made = job("quantize", adapters={"one": adapter()}, scheme="w4a16", method=method, out=method)
        said[method] = quantize.run(made, silent)["adapters"]["one"]
        off[method] = float((logits(opened(made.folder / "model", torch.float32), ids) - right).square().mean())
    assert off["awq-gptq"] < 0.8 * off["awq"] and off["awq-gptq"] < 0.8 * off["rtn"] and off["gptaq"] < 0.8 * off["rtn"]
    assert said["awq-gptq"] == said["awq"] == "rewritten: AWQ scales folded in"


def test_nothing_is_apart_where_no_layer_was_rounded(base, job):
    model = CalibratedModel(base, windows(job("quantize")))
    readers, begun = first_readers(model.units_of(0)), model.entered()
    sums, apart, after = model.products(0, readers, begun, begun)
    same = model.hessians(0, readers, begun)
    assert list(sums) == list(same) == list(apart) and all(map(torch.equal, sums.values(), same.values()))
    assert not any(bool(of_unit.any()) for of_unit in apart.values())
    other = Entered([1.5 * state for state in after.states], begun.calls)
    _, apart, _ = model.products(1, first_readers(model.units_of(1)), after, other)
    assert all(bool(of_unit.any()) for of_unit in apart.values())


def test_layers_keep_16_bits_until_the_likeliest_tokens_stay(base, job):
    """An agreement that 8 bits everywhere do not reach."""
    made = job("quantize", scheme="w8a8", method="rtn", smooth=False, agreement=0.999)
    notes = quantize.run(made, silent)
    first = notes["tried"][0]
    assert first["w8a8"] == len(notes["sensitivity"]) and first["top1"] < 0.999
    assert notes["kept"] and set(notes["kept"].values()) == {"bf16"}
    assert len(notes["tried"]) > 1


@pytest.mark.parametrize("left", [1, 2, 3])
@pytest.mark.parametrize("method", ["gptq", "gptaq"])
def test_layers_that_a_killed_run_has_rounded_are_not_rounded_again(method, left, base, job, monkeypatch):
    """Killed with one of three layers done, with two, and with all when the file is half made: the bytes are those of
    an undisturbed run."""
    monkeypatch.setattr(kept, "SECONDS", 0.0)
    calls, original = [], gptq.gptq
    monkeypatch.setattr(gptq, "gptq", lambda *given: calls.append(1) or original(*given))
    whole = job("quantize", scheme="w4a16", method=method, out="whole")
    quantize.run(whole, silent)
    assert len(calls) == 12  # four units in each of three layers
    subject = job("quantize", scheme="w4a16", method=method, out="killed")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(gptq, "gptq", killing_at(len(calls) + 4 * left + 1, calls, original))
        patched.setattr(checkpoint, "write_shard", half_made)
        quantize.run(subject, silent)
    assert not (subject.folder / "model").exists()
    del calls[:]
    quantize.run(subject, silent)
    assert len(calls) == 12 - 4 * left
    assert artifact.contents(subject.folder / "model") == artifact.contents(whole.folder / "model")


def killing_at(count, calls, original):
    def call(*given):
        calls.append(1)
        if len(calls) == count:
            raise KeyboardInterrupt
        return original(*given)

    return call


def half_made(file, folder, entries):
    file.write_bytes(b"half")
    raise KeyboardInterrupt


def test_what_was_rounded_at_other_levels_does_not_count(base, job, monkeypatch):
    monkeypatch.setattr(kept, "SECONDS", 0.0)
    made = job("quantize", scheme="w4a16")
    quantize.run(made, silent)
    file = kept.Kept(made.folder / "partial" / "layers.safetensors")
    choice = [[unit.label, "w4a16"] for unit in CalibratedModel(base, windows(made)).units]
    assert file.read(choice, made.folder / "model").layers == 3
    assert file.read([[label, "w8a8"] for label, _ in choice], made.folder / "model") is None


def test_the_sensitivity_of_a_unit_is_what_it_does_to_the_answer(base, job):
    """Four bits cost more than eight, and a killed measurement goes on with the next layer."""
    made = job("quantize")
    model = CalibratedModel(base, windows(made), dtype=torch.float32)
    subject = Quantizer(model, 32, "rtn", "compressed-tensors", silent)
    none = channel_scales.NONE
    found = mixed.effects(subject, [formats.W4, formats.W8A16], none, made.folder)
    assert len(found) == 12
    assert sum(cost["w4a16"] for cost in found.values()) > 10 * sum(cost["w8a16"] for cost in found.values())
    (made.folder / "sensitivity.json").write_text(json.dumps({**found, "0.o": {"w4a16": 7.0, "w8a16": 7.0}}))
    assert mixed.effects(subject, [formats.W4], none, made.folder)["0.o"]["w4a16"] == 7.0


def test_the_layers_that_the_engine_fuses_share_a_level(base, job):
    made = job("quantize")
    subject = CalibratedModel(base, windows(made))
    assert [unit.label for unit in subject.units[:4]] == ["0.q/k/v", "0.o", "0.gate/up", "0.down"]


def test_the_same_seed_gives_the_same_bytes(base, job):
    digests = []
    for out in ("one", "two"):
        made = job("quantize", scheme="w4a16", out=out)
        quantize.run(made, silent)
        digests.append((made.folder / "model/model.safetensors").read_bytes())
    assert digests[0] == digests[1]


def test_broken_weights_are_said_before_anything_is_written(base, job, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    broken.mkdir()
    for file in base.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    made = job("quantize", model=broken)
    with pytest.raises(OptimizeError, match="NaN"):
        quantize.run(made, silent)
    assert not (made.folder / "model/config.json").exists()


def test_paths_of_the_pico_model_are_the_units(base: Path):
    assert len(Checkpoint(base).entries) == 3 * 9 + 2
