"""A GGUF export is read back as what it says: weights, words and adapters, by the reader that serves such files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file

from optimize import cli, recipe
from optimize.checkpoint.checkpoint import Checkpoint
from optimize.errors import Refused
from optimize.export import gguf_file
from optimize.pipeline import plan
from serve.models.gguf import conversion
from serve.models.gguf.adapter import write_peft
from serve.models.gguf.checkpoint import Form
from tests.optimize.conftest import sentences, silent

LAYERS, HIDDEN = 4, 256


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With byte-level words, and matrices that 6 bits fit on."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    from optimize.export.gguf_metadata import RULES

    words = Tokenizer(models.BPE())
    (rule,) = next(rule for rule, name in RULES.items() if name == "qwen2")
    split = pre_tokenizers.Split(Regex(rule), "isolated")
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words.train_from_iterator(
        sentences(0, 8), trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<end>"])
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<end>{% endfor %}"
    settings = dict(
        vocab_size=len(tokenizer), hidden_size=HIDDEN, intermediate_size=2 * HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=256, eos_token_id=0, pad_token_id=0,
        tie_word_embeddings=request.param == "llama",
    )  # fmt: skip
    torch.manual_seed(0)
    made = (
        LlamaForCausalLM(LlamaConfig(**settings))
        if request.param == "llama"
        else Qwen2ForCausalLM(Qwen2Config(**settings))
    )
    for name, weight in made.named_parameters():
        if "norm" in name or "bias" in name:
            weight.data.add_(torch.randn_like(weight) * 0.1)
    folder = tmp_path_factory.mktemp("model") / request.param
    made.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def exported(job: Any, model: Path, precision: str, **more: Any) -> tuple[Path, dict[str, Any]]:
    made = job("gguf", model=model, format="gguf", precision=precision, **more)
    return made.folder, gguf_file.run(made, silent)


def served(file: Path, folder: Path) -> dict[str, torch.Tensor]:
    folder.mkdir()
    conversion.convert(file, folder, Form.BFLOAT16, lambda share: None)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "q8_0", "q6_k", "q4_0", "q4_k_m"])
def test_the_reader_that_serves_files_has_the_weights_that_were_measured(model, job, precision, tmp_path):
    folder, notes = exported(job, model, precision)
    theirs, measured = (
        served(folder / "model" / "model.gguf", tmp_path / "served"),
        load_file(folder / "dense/model.safetensors"),
    )
    assert theirs.keys() == measured.keys()
    assert all(torch.equal(theirs[name], measured[name]) for name in theirs)
    original = load_file(model / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"  # whose rows change places, and come back
    lost = (measured[name].float() - original[name].float()).square().mean() / original[name].float().square().mean()
    assert lost < {"fp32": 1e-9, "bf16": 1e-9, "q8_0": 1e-4, "q6_k": 1e-3}.get(precision, 0.02)
    assert (
        abs(sum(notes["types"].values()) - 1) < 0.01 and notes["bytes"] == (folder / "model/model.gguf").stat().st_size
    )


@pytest.mark.parametrize("precision", ["q4_k_m", "q4_0", "q6_k"])
def test_calibrated_matrices_are_read_as_they_were_measured_and_are_nearer_in_what_they_give(
    model, job, precision, tmp_path
):
    from optimize.checkpoint.model import opened, tokenizer

    folder, notes = exported(job, model, precision, method="gptq")
    assert notes["method"] == "gptq"
    theirs = served(folder / "model" / "model.gguf", tmp_path / "served")
    measured = load_file(folder / "dense/model.safetensors")
    assert theirs.keys() == measured.keys() and all(torch.equal(theirs[name], measured[name]) for name in theirs)
    plain, _ = exported(job, model, precision, out="plain")
    reader = gguf.GGUFReader(folder / "model" / "model.gguf")
    before = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(plain / "model" / "model.gguf").tensors}
    assert {tensor.name: tensor.tensor_type for tensor in reader.tensors} == before
    ids = torch.tensor([tokenizer(model)(" ".join(sentences(9, 20))).input_ids[:200]])
    with torch.inference_mode():
        right, ours, other = (
            opened(place, torch.float32)(ids).logits for place in (model, folder / "dense", plain / "dense")
        )
    assert (ours - right).square().mean() < (other - right).square().mean()


def test_words_template_and_ends_are_the_models(model, job, tmp_path):
    from transformers import AutoTokenizer

    folder, _ = exported(job, model, "q8_0")
    served(folder / "model" / "model.gguf", tmp_path / "served")
    before, after = (AutoTokenizer.from_pretrained(place) for place in (model, tmp_path / "served"))
    for text in (*sentences(5, 3), "Über 12 boats, <end> and more\n\n  salt"):
        assert before(text).input_ids == after(text).input_ids
    messages = [{"role": "user", "content": "the river"}]
    assert before.apply_chat_template(messages, tokenize=False) == after.apply_chat_template(messages, tokenize=False)
    assert json.loads((tmp_path / "served/generation_config.json").read_text())["eos_token_id"] == [0]


def test_the_mixture_has_six_bits_where_llama_cpp_has_them(model, job):
    folder, _ = exported(job, model, "q4_k_m")
    reader = gguf.GGUFReader(folder / "model" / "model.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.0.attn_q.weight"] == kinds["blk.1.ffn_down.weight"] == "Q4_K"
    assert kinds["blk.3.ffn_down.weight"] == kinds["blk.2.attn_v.weight"] == "Q6_K"
    assert kinds["output.weight" if "output.weight" in kinds else "token_embd.weight"] == "Q6_K"
    manifest = json.loads(reader.fields["loradock.manifest"].contents())
    assert manifest["precision"] == "q4_k_m"


def test_an_adapter_is_the_same_after_its_way_through_a_file(model, job, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    wrapped = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "down_proj"],
                   rank_pattern={"down_proj": 2}, alpha_pattern={"down_proj": 6}),
    )  # fmt: skip
    for name, weight in wrapped.named_parameters():
        if "lora_" in name:
            weight.data.normal_()
    wrapped.save_pretrained(tmp_path / "peft")
    folder, notes = exported(job, model, "bf16", adapters={"tone": tmp_path / "peft"})
    assert notes["adapters"] == {"tone": "exported for llama.cpp"}
    write_peft(folder / "model/adapters/tone.gguf", model, tmp_path / "config.json", tmp_path / "back.safetensors")
    config, back = json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "back.safetensors")
    original = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert back.keys() == original.keys() and config["lora_alpha"] == 8
    for name, values in original.items():
        # 6 / 2 of alpha and rank become 8 / 2, and three quarters are in B.
        by = 0.75 if "down_proj.lora_B" in name else 1.0
        assert torch.allclose(back[name], by * values, rtol=1e-6), name


@pytest.mark.parametrize("method", ["nearest", "gptq"])
def test_a_recipe_writes_measures_and_judges_a_file(model, texts, method, tmp_path, steps_here):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"model: {model}\ncalibration: {{text: {texts['calibration']}, samples: 4, tokens: 32}}\n"
        f"evaluate: {{text: {texts['evaluation']}, samples: 2, tokens: 32, engine: false, prompts: [the river]}}\n"
        f"export: {{format: gguf, precision: q6_k, method: {method}}}\ngate: {{max_kl: 0.05}}\n"
    )
    assert cli.run([str(file), "--out", str(tmp_path / "out")], Path) == 0
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["scores"]["bytes"] == (tmp_path / "out/model.gguf").stat().st_size
    assert 0 < manifest["scores"]["kl"] < 0.05 and "model.gguf" in manifest["files"]
    again = ["verify", str(tmp_path / "out"), "--model", str(model), "--data", str(texts["calibration"].parent)]
    assert cli.run(again, Path) == 0, "its figures can be repeated"


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("export: {format: gguf, precision: int4}", "has no int4"),
        ("export: {format: onnx, precision: q4_k_m}", "is of GGUF files"),
        ("export: {format: gguf, precision: bf16, method: gptq}", "whose matrices are rounded"),
        ("export: {precision: int8}", "a vllm export would not be rounded: leave it out"),
        ("export: {exporter: optimum}", "writes ONNX graphs, and no vllm export"),
        ("export: {method: gptq}", "for vLLM say `quantize: {method: gptq}`"),
        ("steps: [{quantize: {scheme: w8a8}}]\nexport: {format: gguf, precision: q8_0}", "its own 4 and 8 bits"),
        ("export: {format: gguf, precision: q8_0}", "its tokenizer is not written: it is no byte-level BPE"),
    ],
)
def test_what_no_file_is_made_of_is_refused(written, more, says, tmp_path):
    read = recipe.load(written(more))
    with pytest.raises(Refused, match=says):
        plan.made(read, Path(read.model), {}, tmp_path / "out", 10**12)


def test_too_little_text_to_calibrate_a_file_on_is_refused_before_any_work(model, written, tmp_path):
    file = written("steps: []\nexport: {format: gguf, precision: q8_0, method: gptq}")
    read = recipe.load(file, {"calibration.tokens": "9000"}, model=str(model))
    with pytest.raises(Refused, match="calibration: .* windows of 9000 tokens, not 16"):
        plan.made(read, model, {}, tmp_path / "out", 10**12)


@pytest.mark.parametrize("precision", ["q4_0", "q4_k_m"])
def test_an_output_layer_has_six_bits_where_layers_have_four(precision, model):
    source = Checkpoint(model)
    head = "model.embed_tokens.weight" if source.tied else "lm_head.weight"
    assert gguf_file._kind(source, head, precision) == "Q6_K"
    assert gguf_file._kind(source, "model.layers.1.self_attn.q_proj.weight", precision).startswith("Q4")


@pytest.mark.parametrize("form", ["gguf, precision: fp16", "onnx", "genai"])
@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"target_modules": ["q_proj", "embed_tokens"]}, "'one' adapts the embedding, which"),
        ({"target_modules": ["q_proj"], "lora_bias": True}, r"'one' has biases .*\(lora_bias\), which"),
    ],
)
def test_what_a_file_of_an_adapter_has_no_place_for_is_refused(model, settings, says, form, written, tmp_path):
    """The biases were left out of the file, and the figures were those of the adapter with them."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if "lora_bias" in settings and base.config.model_type == "llama":
        pytest.skip("has no biases to add one to")
    if form == "genai":
        pytest.importorskip("onnxruntime_genai")
    get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, **settings)).save_pretrained(tmp_path / "one")
    more = f"adapters: {{one: {tmp_path / 'one'}}}\nexport: {{format: {form}}}\n"
    read = recipe.load(written(more), model=str(model))
    with pytest.raises(Refused, match=says + ".*merge it into the base"):
        plan.made(read, model, {}, tmp_path / "out", 10**12)


def test_an_adapter_of_a_shared_output_layer_has_no_file(model, written, tmp_path):
    """llama.cpp has no tensor of that name then, and refuses the adapter."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "lm_head"])
    get_peft_model(base, config).save_pretrained(tmp_path / "one")
    more = f"adapters: {{one: {tmp_path / 'one'}}}\nexport: {{format: gguf, precision: fp16}}\n"
    read = recipe.load(written(more), model=str(model))
    if not Checkpoint(model).tied:
        plan.made(read, model, {}, tmp_path / "out", 10**12)
        return
    with pytest.raises(Refused, match="'one' adapts the output layer, which is the embedding in this base"):
        plan.made(read, model, {}, tmp_path / "out", 10**12)
