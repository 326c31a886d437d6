import json
import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from serve.cpu_kernels.build import keeps_gguf
from serve.errors import ConfigError
from serve.models import checkpoint, engine_memory
from serve.models.dimensions import dimensions
from serve.models.gguf import conversion
from serve.models.gguf.checkpoint import Form, ensure, parts_of, to_train
from serve.models.gguf.families import FAMILIES
from serve.models.gguf.kept import METHOD, SCALES
from tests.support.gguf_files import HEAD, HEADS, HIDDEN, INNER, KEYS, WORDS, write


def made(path: Path, cache: Path, form: Form = Form.BFLOAT16) -> Path:
    said: list[str] = []
    return ensure(path, cache, said.append, form)


@pytest.mark.parametrize(
    "kind", ["F32", "F16", "Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL"]
)
def test_weights_are_the_files_to_the_bit_of_bfloat16(kind, tmp_path):
    file = write(tmp_path / "a.gguf", "qwen2", kind)
    weights = load_file(made(file, tmp_path / "cache") / "model.safetensors")
    names = {
        "blk.1.ffn_down.weight": "model.layers.1.mlp.down_proj.weight",
        "token_embd.weight": "model.embed_tokens.weight",
    }
    for tensor in gguf.GGUFReader(file).tensors:
        if tensor.name in names:
            values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            assert torch.equal(weights[names[tensor.name]], torch.from_numpy(values).bfloat16())
            assert values.std() > 0.001


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3", "phi3"])
def test_a_family_is_what_transformers_reads_from_the_same_file(family, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    file = write(tmp_path / "a.gguf", family, "F32", extra={f"{family}.rope.freq_base": 50_000.0})
    config = AutoConfig.from_pretrained(tmp_path, gguf_file="a.gguf")
    if family == "qwen3":
        config.head_dim = HEAD  # transformers takes 128 whatever the file says,
    if family == "gemma3":
        config.query_pre_attn_scalar = (
            HEAD  # and 256 here, which is the length of every Gemma's heads but the largest's
        )
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="a.gguf", config=config, dtype=torch.float32
    ).eval()
    ours, report = AutoModelForCausalLM.from_pretrained(
        made(file, tmp_path / "cache"), dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    prompt = torch.tensor([[1, 5, 90, 7, 7, 23, 60, 12]])
    with torch.no_grad():
        difference = (ours.eval()(prompt).logits - theirs(prompt).logits).abs().max()
    assert difference < 0.02 * theirs(prompt).logits.abs().max()


def test_granite_has_its_four_multipliers_and_every_weight(tmp_path):
    from transformers import AutoModelForCausalLM

    folder = made(write(tmp_path / "a.gguf", "granite"), tmp_path / "cache")
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert (model.config.embedding_multiplier, model.config.logits_scaling) == (12.0, 8.0)
    assert model.config.attention_multiplier == pytest.approx(0.02)


def test_llama_3s_frequencies_become_its_scaling_and_others_are_refused(tmp_path):
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    path = write(tmp_path / "a.gguf", "llama")
    folder = made(path, tmp_path / "cache")
    config = AutoConfig.from_pretrained(folder)
    config.rope_parameters |= {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config.rope_parameters["original_max_position_embeddings"] = 8192
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1.0 / 10_000.0 ** (torch.arange(0, 32, 2) / 32)
    factors = (plain / scaled).numpy().astype(np.float32)
    for values, refused in ((factors, False), (factors * np.float32(1.5), True)):
        file = _with_factors(tmp_path / f"b{refused}.gguf", values)
        if refused:
            with pytest.raises(ConfigError, match="scales its frequencies"):
                made(file, tmp_path / "cache")
        else:
            scaling = json.loads((made(file, tmp_path / "cache") / "config.json").read_text())["rope_scaling"]
            assert (scaling["rope_type"], scaling["factor"]) == ("llama3", pytest.approx(32.0))


def _with_factors(path: Path, values: np.ndarray) -> Path:
    original = gguf.GGUFWriter.write_header_to_file

    def added(self, *args):
        self.add_tensor("rope_freqs.weight", values)
        return original(self, *args)

    gguf.GGUFWriter.write_header_to_file = added
    try:
        return write(path, "llama")
    finally:
        gguf.GGUFWriter.write_header_to_file = original


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"family": "mamba"}, "architecture 'mamba'"),
        ({"extra": {"llama.expert_count": 4.0}}, "llama.expert_count, which is not understood"),
        ({"extra": {"llama.rope.scaling.type": "dynamic"}}, "rope.scaling"),
        ({"rule": "a-new-rule"}, "rule 'a-new-rule'"),
        ({"resized": {"token_embd.weight": (len(WORDS) - 1, 256)}}, "96 words and an embedding of 95"),
        ({"resized": {"blk.1.ffn_down.weight": (256, 256)}}, "'blk.1.ffn_down.weight' .* has the sizes"),
        ({"resized": {"blk.2.ffn_down.weight": (256, 512)}}, "layer too many"),
        ({"resized": {"blk.0.unknown.weight": (256, 256)}}, "'blk.0.unknown.weight' is not one"),
    ],
)
def test_what_would_be_served_wrong_is_refused(given, sentence, tmp_path):
    with pytest.raises(ConfigError, match=sentence):
        made(write(tmp_path / "a.gguf", **given), tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("gguf-*/config.json"))


def made_elsewhere(path: Path, cache: Path) -> Path:
    """By a process that is gone afterwards."""
    code = "import sys; from tests.serve.models.gguf.test_checkpoint import *; print(made(*map(Path, sys.argv[1:])))"
    return Path(subprocess.check_output([sys.executable, "-c", code, str(path), str(cache)], text=True).strip())


def test_a_file_is_made_once_and_anew_when_it_was_replaced(tmp_path):
    file, cache = write(tmp_path / "tiny-q8_0.gguf"), tmp_path / "cache"
    first = made_elsewhere(file, cache)
    (first / "mark").touch()
    assert made_elsewhere(file, cache) == first and (first / "mark").exists()
    write(file, seed=1)
    os.utime(file, ns=(1, 1))
    second = made(file, cache)
    assert second != first and not first.exists()


def test_what_a_server_has_stays_when_another_finds_the_file_replaced(tmp_path):
    file, cache = write(tmp_path / "tiny-q8_0.gguf"), tmp_path / "cache"
    served = made(file, cache)
    write(file, seed=1)
    os.utime(file, ns=(1, 1))
    other = made_elsewhere(file, cache)
    assert other != served and (served / "model.safetensors").is_file()


def test_a_link_and_its_file_do_not_remove_what_was_made_of_each_other(tmp_path):
    file, cache = write(tmp_path / "tiny-q8_0.gguf"), tmp_path / "cache"
    (link := tmp_path / "latest.gguf").symlink_to(file)
    first, second = made_elsewhere(file, cache), made_elsewhere(link, cache)
    assert first.name.startswith("gguf-tiny-q8_0-") and second.name.startswith("gguf-latest-")
    assert first.is_dir() and second.is_dir()
    write(file, seed=1)
    os.utime(file, ns=(1, 1))
    made_elsewhere(file, cache)
    assert not first.exists() and not second.exists()


def test_a_name_of_any_letters_is_the_files_and_its_parts_are_no_others(tmp_path):
    for name in ("model [q4] * ?", "модель 模型", "a b"):
        parts = [tmp_path / f"{name}-{part:05d}-of-00002.gguf" for part in (1, 2)]
        for path in (*parts, tmp_path / f"{name}-v2-00001-of-00002.gguf", tmp_path / f"{name}-00001-of-00003.gguf"):
            path.touch()
        assert parts_of(parts[0]) == parts
    file = write(tmp_path / "модель [q4] b.gguf")
    folder = made(file, tmp_path / "cache")
    assert checkpoint.default_name(str(file)) == "модель [q4] b" and (folder / "config.json").is_file()


@pytest.mark.parametrize("name", ["sha256-0a1b", "Tiny.Q8_0.GGUF"])
def test_a_file_is_known_by_its_first_bytes_whatever_it_is_called(name, tmp_path):
    file = write(tmp_path / name)
    assert (Path(checkpoint.find(str(file), tmp_path / "cache")) / "model.safetensors").is_file()
    assert checkpoint.default_name(str(file)) == name.removesuffix(".GGUF")
    assert dimensions(str(file)).hidden == HIDDEN
    (tmp_path / "other").write_text("not one")
    with pytest.raises(ConfigError, match="there is no model at"):
        checkpoint.find(str(tmp_path / "other"), tmp_path / "cache")


def test_special_tokens_beyond_the_vocabulary_are_none(tmp_path):
    folder = made(write(tmp_path / "a.gguf", extra={"tokenizer.ggml.bos_token_id": 3e9}), tmp_path / "cache")
    config = json.loads((folder / "config.json").read_text())
    assert config["bos_token_id"] is None and config["eos_token_id"] == WORDS.index("<|end|>")


def test_all_parts_of_a_model_are_one(tmp_path):
    whole = write(tmp_path / "whole.gguf")
    reader = gguf.GGUFReader(whole)
    (folder := tmp_path / "parts").mkdir()
    names = [folder / f"a-{part:05d}-of-00002.gguf" for part in (1, 2)]
    for part, path in enumerate(names):
        out = gguf.GGUFWriter(path, "llama")
        out.add_uint16("split.no", part)
        out.add_uint16("split.count", 2)
        for key, field in reader.fields.items():
            if part == 0 and not key.startswith("GGUF.") and key != "general.architecture":
                kind = field.types[0]
                out.add_key_value(key, field.contents(), kind, field.types[-1] if kind == 9 else None)
        for tensor in reader.tensors[part::2]:
            out.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_tensors_to_file()
        out.close()
    one, other = (load_file(made(path, tmp_path / "cache") / "model.safetensors") for path in (whole, names[0]))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(ConfigError, match="serve the first one"):
        made(names[1], tmp_path / "cache")
    names[1].unlink()
    with pytest.raises(ConfigError, match="is missing beside"):
        made(names[0], tmp_path / "cache")


def test_serve_finds_a_file_and_names_it_without_its_ending(tmp_path):
    file = write(tmp_path / "Tiny-Chat.Q8_0.gguf", extra={"general.basename": "Tiny", "general.finetune": "Chat"})
    folder = checkpoint.find(str(file), tmp_path / "cache")
    assert (Path(folder) / "model.safetensors").is_file()
    assert checkpoint.default_name(str(file)) == "Tiny-Chat.Q8_0"
    assert not checkpoint.is_another_model("somebody/Tiny-Chat", folder, "Tiny-Chat.Q8_0")
    assert checkpoint.is_another_model("somebody/Other-Chat", folder, "Tiny-Chat.Q8_0")
    with pytest.raises(ConfigError, match="serve one of its files: Tiny-Chat.Q8_0.gguf"):
        checkpoint.find(str(tmp_path), tmp_path / "cache")


def test_the_template_the_end_of_a_turn_and_the_words_are_the_files(tmp_path):
    import transformers
    from transformers import AutoTokenizer

    folder = made(write(tmp_path / "a.gguf"), tmp_path / "cache")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # Without it transformers says of vocabularies above 100,000 that they split words wrongly.
    assert json.loads((folder / "config.json").read_text())["transformers_version"] == transformers.__version__
    text = tokenizer.apply_chat_template([{"role": "user", "content": "ab a"}], tokenize=False)
    assert text == "<|user|>ab a<|end|>"
    ids = tokenizer(text)["input_ids"]
    assert [WORDS[number] for number in ids] == ["<|user|>", "ab", "Ġa", "<|end|>"]
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [WORDS.index("<|end|>")]


def test_every_family_has_been_compared():
    assert set(FAMILIES) == {"llama", "qwen2", "qwen3", "gemma3", "phi3", "granite"}


def kept(file: Path) -> Path:
    """Its checkpoint with the weights as they are, made in this process."""
    folder = file.with_suffix("")
    folder.mkdir()
    conversion.convert(file, folder, Form.KEPT, lambda share: None)
    return folder


def rows_in(file: Path, name: str) -> torch.Tensor:
    return next(torch.from_numpy(np.array(it.data)) for it in gguf.GGUFReader(file).tensors if it.name == name)


@pytest.mark.parametrize("kind", sorted(SCALES))
def test_kept_weights_are_the_files_bytes(kind, tmp_path):
    file = write(tmp_path / "a.gguf", "qwen2", kind)
    folder = kept(file)
    weights, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    assert torch.equal(weights["model.layers.1.mlp.down_proj.weight"], rows_in(file, "blk.1.ffn_down.weight"))
    assert torch.equal(weights["model.embed_tokens.weight"], rows_in(file, "token_embd.weight"))
    assert weights["model.norm.weight"].dtype == weights["model.layers.0.self_attn.q_proj.bias"].dtype == torch.bfloat16
    quantization = config["quantization_config"]
    assert quantization["quant_method"] == METHOD and set(quantization["types"].values()) == {kind}
    assert len(quantization["types"]) == 15  # the embedding, and seven of each layer


def test_kept_rows_of_queries_and_keys_are_in_the_checkpoints_order(tmp_path):
    """The first half of a head's rows, then the second, where llama.cpp has them by turns."""
    file = write(tmp_path / "a.gguf", "llama", "Q4_K")
    weights = load_file(kept(file) / "model.safetensors")
    for part, name, heads in (("q_proj", "attn_q", HEADS), ("k_proj", "attn_k", KEYS)):
        theirs = rows_in(file, f"blk.0.{name}.weight")
        order = [head * HEAD + 2 * i + half for head in range(heads) for half in (0, 1) for i in range(HEAD // 2)]
        assert torch.equal(weights[f"model.layers.0.self_attn.{part}.weight"], theirs[order])


def test_a_layer_whose_tensors_do_not_fit_together_is_bfloat16(tmp_path):
    kinds = {"blk.0.attn_v.weight": "F16", "blk.1.ffn_up.weight": "Q6_K", "blk.1.attn_v.weight": "Q6_K"}
    folder = kept(write(tmp_path / "a.gguf", "qwen2", "Q4_K", kinds=kinds))
    types = json.loads((folder / "config.json").read_text())["quantization_config"]["types"]
    weights = load_file(folder / "model.safetensors")
    for module, kind in {"0.self_attn.q_proj": None, "1.mlp.gate_proj": None, "1.self_attn.v_proj": "Q6_K"}.items():
        assert types.get(f"model.layers.{module}") == kind
        dtype = torch.uint8 if kind else torch.bfloat16
        assert weights[f"model.layers.{module}.weight"].dtype == dtype


def test_a_scale_that_is_not_finite_is_refused(tmp_path):
    file = write(tmp_path / "a.gguf", "qwen2", "Q8_0")
    tensor = next(it for it in gguf.GGUFReader(file).tensors if it.name == "blk.0.ffn_down.weight")
    data = bytearray(file.read_bytes())
    data[tensor.data_offset + 34 * 5 : tensor.data_offset + 34 * 5 + 2] = np.float16("inf").tobytes()
    file.write_bytes(data)
    with pytest.raises(ConfigError, match="'blk.0.ffn_down.weight' .* not finite"):
        kept(file)


def test_memory_and_slots_of_kept_weights_are_counted(tmp_path):
    file = write(tmp_path / "a.gguf", "qwen2", "Q4_K")
    as_it_is, plain = (made(file, tmp_path / "cache", form) for form in Form)
    tensors = sum(it.n_bytes for it in gguf.GGUFReader(file).tensors if len(it.shape) == 2)
    assert tensors < engine_memory.weights(as_it_is) < 1.05 * tensors
    assert engine_memory.slots(as_it_is, 2, 8) == engine_memory.slots(plain, 2, 8) > 0
    assert 3 * engine_memory.weights(as_it_is) < engine_memory.weights(plain)


def test_both_forms_are_one_model_and_training_reads_bfloat16(tmp_path):
    file = write(tmp_path / "a.gguf", "qwen2", "Q4_K")
    served = made(file, tmp_path / "cache", Form.KEPT)
    trained = to_train(served)
    assert load_file(trained / "model.safetensors")["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert to_train(trained) == trained and made(file, tmp_path / "cache") == trained
    assert checkpoint.digest_of(str(served)) == checkpoint.digest_of(str(trained))
    assert made(file, tmp_path / "cache", Form.KEPT) == served  # neither removed the other
    file.unlink()
    with pytest.raises(ConfigError, match="is not there any more"):
        to_train(served)


@pytest.mark.parametrize(
    "asked",
    [
        ("off", "auto", {}),
        ("auto", "int4", {}),
        ("auto", "auto", {"tensor_parallel_size": "2"}),
        ("auto", "auto", {"dtype": "float32"}),
        ("auto", "auto", {"quantization": "fp8"}),
    ],
)
def test_other_settings_than_the_kernels_take_make_bfloat16(asked):
    assert not keeps_gguf(*asked)


def test_gpu_plans_know_a_file_by_its_header(tmp_path):
    file = write(tmp_path / "a.gguf", "qwen2", "Q4_K")
    known = dimensions(str(file))
    assert (known.hidden, known.intermediate, known.kv_heads) == (HIDDEN, INNER, KEYS)
    assert known.qkv_bias and not list(tmp_path.glob("*/gguf-*"))
