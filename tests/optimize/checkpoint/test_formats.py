"""Each format is what others take it for, and what is read is what was written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from optimize import recipe
from optimize.checkpoint import formats, kv_cache
from optimize.checkpoint.checkpoint import Checkpoint, Entry, Schemes, write_shard
from optimize.checkpoint.model import adapted, logits, opened
from optimize.errors import OptimizeError, Refused
from optimize.pipeline import plan
from optimize.steps import calibrated
from optimize.steps.merge import merge
from optimize.steps.quantize import awq, quantize
from tests.optimize.conftest import silent
from tests.support import quantized
from tests.support.foreign import exports

IDS = torch.arange(2, 34).view(2, 16)
GPU = ("fp8-block", "nvfp4", "nvfp4a16", "mxfp4", "mxfp4a16")


@pytest.fixture(scope="module")
def wide(tokenizer, tmp_path_factory):
    """A model whose layers are as wide as a block of float8 is; its values are of very different size."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, eos_token_id=0, bos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "layernorm" in name:
            parameter.data = torch.logspace(-1, 1, 256)[torch.randperm(256)]
    folder = tmp_path_factory.mktemp("wide") / "wide"
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("scheme", GPU)
def test_transformers_reads_the_checkpoint_as_we_do(scheme, wide, job):
    """compressed-tensors' own loader gives the same weights, and a layer that rounds its input as ours does."""
    from transformers import AutoModelForCausalLM

    made = job("quantize", model=wide, scheme=scheme)
    assert quantize.run(made, silent)["layers"] == {scheme: 14}
    folder = made.folder / "model"
    ours, plain = opened(folder, torch.float32), opened(wide, torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.inference_mode():
        theirs(IDS)  # the first call decompresses, into bfloat16
        for module in theirs.modules():
            torch.nn.Module._apply(module, lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)
    for name, weight in ours.state_dict().items():
        assert torch.allclose(weight, theirs.state_dict()[name], rtol=1e-2, atol=1e-5), name
        assert "_proj" not in name or not torch.equal(weight, plain.state_dict()[name])
    x = torch.randn(1, 64, 256) * torch.logspace(-1, 1, 256)
    name = "model.layers.1.mlp.up_proj"
    with torch.inference_mode():
        right, full, got = (model.get_submodule(name)(x) for model in (theirs, plain, ours))
    assert (got - right).square().mean() < 1e-2 * (got - full).square().mean()


def test_float_4_takes_the_bytes_that_it_promises(wide, job):
    before = sum(e.bytes for n, e in Checkpoint(wide).entries.items() if n.endswith("_proj.weight"))
    for scheme, bits in (("nvfp4a16", 4.5), ("mxfp4a16", 4.25)):
        made = job("quantize", model=wide, scheme=scheme, out=scheme)
        quantize.run(made, silent)
        entries = Checkpoint(made.folder / "model").entries
        after = sum(e.bytes for n, e in entries.items() if n.endswith(("weight_packed", "weight_scale")))
        assert after == pytest.approx(before * bits / 16)


def test_the_layers_that_the_engine_fuses_share_their_global_scale(wide, job):
    made = job("quantize", model=wide, scheme="nvfp4")
    quantize.run(made, silent)
    read = Checkpoint(made.folder / "model")
    for kind in ("weight_global_scale", "input_global_scale"):
        scales = {float(read.tensor(f"model.layers.1.self_attn.{name}_proj.{kind}")) for name in "qkv"}
        assert len(scales) == 1


def test_a_gptq_checkpoint_unpacks_in_vllm_to_our_integers(base, job):
    """vLLM's own unpacking of GPTQ's layout, and the same model as in compressed-tensors' format."""
    from vllm.model_executor.layers.quantization.utils.quant_utils import (
        unpack_cols,
        unpack_quantized_values_into_int32,
    )
    from vllm.scalar_type import scalar_types

    models = {}
    for form in ("gptq", "compressed-tensors"):
        made = job("quantize", scheme="w4a16", format=form, out=form)
        quantize.run(made, silent)
        models[form] = made.folder / "model"
    read, name = Checkpoint(models["gptq"]), "model.layers.1.mlp.up_proj"
    words = read.tensor(f"{name}.qweight")
    integers = unpack_quantized_values_into_int32(words, scalar_types.uint4b8, packed_dim=0) - 8
    zeros = unpack_cols(read.tensor(f"{name}.qzeros"), 4, 1, 128)
    assert zeros.unique().tolist() == [7]
    scales = read.tensor(f"{name}.scales").float().repeat_interleave(64, 0)
    ours = opened(models["gptq"], torch.float32)
    assert torch.equal((integers.float() * scales).T, ours.get_submodule(name).weight)
    assert torch.equal(logits(ours, IDS), logits(opened(models["compressed-tensors"], torch.float32), IDS))
    config = json.loads((models["gptq"] / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["group_size"], config["sym"]) == ("gptq", 64, True)


def test_an_autoround_checkpoint_is_read_as_gptq_which_it_packs_alike(base, job):
    made = job("quantize", scheme="w4a16", format="gptq", out="gptq")
    quantize.run(made, silent)
    gptq, other = made.folder / "model", made.folder / "auto-round"
    shutil.copytree(gptq, other)
    tensors = load_file(other / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith("g_idx")}
    save_file(kept, other / "model.safetensors", {"format": "pt"})
    config = json.loads((other / "config.json").read_text())
    # As auto-round 0.16 writes it.
    said = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4, "data_type": "int"}
    said |= {"group_size": 64, "sym": True, "block_name_to_quantize": "model.layers", "autoround_version": "0.16.1"}
    (other / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    assert torch.equal(logits(opened(other), IDS), logits(opened(gptq), IDS))
    said["packing_format"] = "auto_round:auto_awq"
    (other / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    with pytest.raises(Refused, match="auto_round:auto_awq"):
        opened(other)


def test_awq_protects_the_channels_that_matter():
    """One input in eight is large: rounding to the nearest spoils the answer more than AWQ does."""
    torch.manual_seed(0)
    x = torch.randn(256, 128)
    x[:, ::8] *= 20
    weight, hessian = torch.randn(64, 128), x.T @ x
    factor = awq.factors(weight, hessian, 4, 32)
    off = {
        "rtn": awq._nearest(weight, 4, 32) - weight,
        "awq": awq._nearest(weight * factor, 4, 32) / factor - weight,
    }
    errors = {name: float((x @ error.T).square().mean()) for name, error in off.items()}
    assert errors["awq"] < 0.5 * errors["rtn"]
    assert float(factor[::8].min()) > float(factor[1::8].max())


def test_awq_answers_closer_than_rounding_and_rewrites_the_adapters(wide, job, adapter, base):
    plain, found = opened(wide, torch.float32), {}
    for method in ("rtn", "awq"):
        made = job("quantize", model=wide, scheme="w4a16", method=method, out=method)
        quantize.run(made, silent)
        off = logits(opened(made.folder / "model", torch.float32), IDS) - logits(plain, IDS)
        found[method] = float(off.square().mean())
    assert found["awq"] < found["rtn"]
    made = job("quantize", scheme="w4a16", method="awq", adapters={"one": (folder := adapter())}, out="adapted")
    assert quantize.run(made, silent)["adapters"] == {"one": "rewritten: AWQ scales folded in"}
    with adapted(opened(base, torch.float32), folder) as model:
        right = logits(model, IDS)
    new = opened(made.folder / "model", torch.float32)
    with adapted(new, made.folder / "adapters/one") as model:
        folded = float((logits(model, IDS) - right).square().mean())
    with adapted(new, folder) as model:
        unchanged = float((logits(model, IDS) - right).square().mean())
    assert folded < unchanged


def test_keys_and_values_fit_float8_and_are_rounded_as_in_the_cache(base, job):
    made = job("quantize", kv_cache="fp8")
    quantize.run(made, silent)
    read = Checkpoint(made.folder / "model")
    assert read.quantization["kv_cache_scheme"] == kv_cache.SCHEME
    names = [name for name in read.entries if name.endswith(kv_cache.SCALES)]
    assert len(names) == 6 and all(read.entries[name].shape == (1,) for name in names)
    plain = job("quantize", out="plain")
    quantize.run(plain, silent)
    eight, sixteen = (opened(m.folder / "model", torch.float32) for m in (made, plain))
    off = (logits(eight, IDS) - logits(sixteen, IDS)).square().mean()
    assert 0 < off < 0.01 * logits(sixteen, IDS).square().mean()
    layer = sixteen.model.layers[1].self_attn
    values = []
    layer.v_proj.register_forward_hook(lambda *args: values.append(args[2]))
    windows = torch.tensor(calibrated.windows(made))
    logits(opened(base), windows[:1])
    logits(sixteen, windows[:1])
    widest = float(read.tensor("model.layers.1.self_attn.v_scale")) * kv_cache.LARGEST
    assert float(values[0].abs().max()) < 1.3 * widest


@pytest.mark.parametrize(
    ("step", "target", "says"),
    [
        ("scheme: nvfp4", "cpu", "vLLM has NVFP4 for GPUs alone"),
        ("scheme: fp8-block", "cpu", "only emulates fp8 on CPUs"),
        ("scheme: fp8-block", "gpu", "rounds 128 numbers together, and the model has layers of width [64]"),
        ("scheme: w8a8, ignore: [lm_haed]", "cpu", "ignore 'lm_haed' names no layer of the model; there is down_proj"),
    ],
)
def test_what_the_target_cannot_run_is_refused_before_calibration(step, target, says, written, tmp_path):
    read = recipe.load(written(f"target: {target}\nsteps: [{{quantize: {{{step}}}}}]"))
    with pytest.raises(Refused) as refused:
        plan.made(read, plan.Path(read.model), {}, tmp_path / "out", 10**12)
    assert says in str(refused.value)


def test_ignored_layers_keep_their_bits(base, job):
    made = job("quantize", ignore=("lm_head", "o_proj", "re:model\\.layers\\.0\\."))
    assert quantize.run(made, silent)["layers"] == {"w8a8": 12}
    read = Checkpoint(made.folder / "model")
    assert read.entries["model.layers.2.self_attn.o_proj.weight"].dtype == "BF16"
    assert {"model.layers.0.mlp.up_proj", "model.layers.1.self_attn.o_proj"} <= set(read.quantization["ignore"])
    assert Schemes(read.quantization).of("model.layers.1.mlp.up_proj")


@pytest.mark.parametrize("options", [
    {"scheme": "w8a8"}, {"scheme": "w4a16"}, {"scheme": "w4a16", "format": "gptq"}, {"scheme": "w8a16"}
])  # fmt: skip
def test_merging_into_a_quantized_base_is_refused_unless_it_may_be_rounded_again(options, base, job, adapter, written):
    first = job("quantize", out="first", method="rtn", **options)
    quantize.run(first, silent)
    quantized, folder = first.folder / "model", adapter()
    assert Checkpoint(quantized).shapes == {name: entry.shape for name, entry in Checkpoint(base).entries.items()}

    def planned(steps: str) -> None:
        file = written(f"adapters: {{one: {folder}}}\nsteps: [{steps}]")
        read = recipe.load(file, {"model": str(quantized)})
        plan.made(read, quantized, {}, file.parent / "out", 10**12)

    with pytest.raises(Refused, match="rounds them twice: start from the original checkpoint, or accept that with"):
        planned("{merge: {adapters: [one]}}")
    planned("{merge: {adapters: [one], requantize: true}}, {quantize: {}}")
    made = job("merge", model=quantized, adapters={"one": folder}, names=["one"], requantize=True)
    assert merge.run(made, silent)["kl_to_base_plus_adapter"] < 1e-3
    merged = Checkpoint(made.folder / "model")
    assert merged.quantization is None and merged.entries["model.layers.0.mlp.up_proj.weight"].dtype == "BF16"
    with adapted(opened(quantized, torch.float32, rounds=False), folder) as model:
        right = logits(model, IDS)
    assert torch.allclose(logits(opened(merged.folder, torch.float32), IDS), right, atol=0.1)


@pytest.mark.parametrize(
    ("scheme", "known"),
    [
        ("fp8", "_is_fp8_w8a8"),
        ("fp8-block", "_is_fp8_w8a8"),
        ("nvfp4", "_is_nvfp4_format"),
        ("nvfp4a16", "_is_nvfp4_format"),
        ("mxfp4", "_is_mxfp4"),
        ("mxfp4a16", "_is_mxfp4"),
    ],
)
def test_vllm_recognizes_what_only_a_gpu_can_run(scheme, known, wide, job):
    """Its own reading of the config; and the tensors have the names that its schemes register for a layer."""
    from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors

    made = job("quantize", model=wide, scheme=scheme, method="rtn")
    quantize.run(made, silent)
    read = Checkpoint(made.folder / "model")
    config = compressed_tensors.CompressedTensorsConfig.from_config(dict(read.quantization))
    linear = config.target_scheme_map["Linear"]
    weights, inputs = linear["weights"], linear["input_activations"]
    assert getattr(config, known)(*([weights, inputs] if known == "_is_fp8_w8a8" else [weights]))
    assert (inputs is None) == scheme.endswith("a16")
    name = "model.layers.0.mlp.down_proj"
    ours = {entry.removeprefix(f"{name}.") for entry in read.entries if entry.startswith(name)}
    if scheme == "nvfp4":
        assert ours == {"weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"}
    if scheme == "mxfp4":
        assert ours == {"weight_packed", "weight_scale"}
        assert read.entries[f"{name}.weight_scale"].dtype == "U8"


def test_awq_goes_with_a_budget(base, job):
    """Four bits with AWQ's scales where they do, more bits elsewhere, and one checkpoint of it all."""
    made = job("quantize", scheme="w4a16", method="awq", budget=0.02)
    notes = quantize.run(made, silent)
    assert sum(notes["layers"].values()) == 21 and notes["tried"]
    assert logits(opened(made.folder / "model"), IDS).isfinite().all()


def test_bytes_that_are_cut_short_are_a_sentence(tmp_path):
    (tmp_path / "whole").write_bytes(bytes(100))
    with pytest.raises(Refused, match="whole was cut short"):
        write_shard(tmp_path / "made", tmp_path, {"weight": Entry("whole", "U8", (90,), 90, 20)})


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [64, 72, 75])
def test_integers_are_packed_as_compressed_tensors_packs_them(bits, columns):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    integers = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (9, columns)).to(torch.int8)
    packed = formats.packed_integers(integers, bits)
    assert torch.equal(packed, pack_to_int32(integers, bits))
    assert torch.equal(formats.unpacked_integers(packed, bits)[:, :columns], integers)


@pytest.mark.parametrize("order", ["", "group"])
def test_llm_compressors_checkpoint_with_zero_points_and_patterns_is_read_as_its_own_loader_reads_it(
    order, base, tmp_path
):
    """W4A16_ASYM, its targets and what it ignores as regular expressions, its columns in any order."""
    folder = tmp_path / "theirs"
    right = exports.llm_compressor(base, folder, order)
    ours = opened(folder, torch.float32).state_dict()
    for name, weight in right.items():
        assert torch.allclose(ours[name], weight, atol=1e-6), name


def test_a_quantized_model_that_is_opened_takes_its_weights_and_not_what_making_them_took(tokenizer, tmp_path):
    """Between the weights lay what had been freed: a quarter more memory than the plan had counted."""
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=512, intermediate_size=2048, num_hidden_layers=16,
        num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=True,
    ).save_pretrained(tmp_path)  # fmt: skip
    scheme = quantized.Scheme("pack-quantized", group=64)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"architectures": ["LlamaForCausalLM"], "quantization_config": scheme.config()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shapes = {f"self_attn.{name}_proj": (512, 512) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (2048, 512), "mlp.up_proj": (2048, 512), "mlp.down_proj": (512, 2048)}
    tensors = {"model.embed_tokens.weight": torch.ones(len(tokenizer), 512), "model.norm.weight": torch.ones(512)}
    for layer in (f"model.layers.{at}." for at in range(16)):
        tensors |= {
            f"{layer}{norm}.weight": torch.ones(512) for norm in ("input_layernorm", "post_attention_layernorm")
        }
        for name, shape in shapes.items():
            tensors |= {f"{layer}{name}.{part}": it for part, it in scheme.rounded(torch.randn(shape)).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    program = (
        "import sys, os, torch; from pathlib import Path\n"
        "from optimize.checkpoint.model import opened; from optimize.pipeline.child import resident_bytes\n"
        "folder = Path(sys.argv[1]); model = opened(folder, torch.float32); first = resident_bytes(os.getpid())\n"
        "again = opened(folder, torch.float32)\n"
        "size = sum(it.nbytes for it in again.parameters())\n"
        "print((resident_bytes(os.getpid()) - first) / size)\n"
    )
    out = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert 0.9 < float(out.stdout) < 1.15


def test_a_weight_that_the_config_has_otherwise_is_told_by_name_and_both_shapes(base, tmp_path):
    """It was PyTorch's error of a whole page."""
    model = shutil.copytree(base, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(3)
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(Refused, match=r"does not fit its config\.json: model\.norm\.weight is \[3\], and \[64\] there"):
        opened(model)


def test_a_broken_matrix_is_called_by_its_own_name(base, job, tmp_path):
    model = shutil.copytree(base, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.0.self_attn.v_proj.weight"][0, 0] = torch.nan
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(OptimizeError, match=r"v_proj holds NaN or infinity"):
        quantize.run(job("quantize", model=model, scheme="w8a16", method="rtn"), silent)
