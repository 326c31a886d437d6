"""The plan is made from headers, by the rules beside each step."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file

from optimize import processor
from optimize.checkpoint import architectures
from optimize.checkpoint.checkpoint import Checkpoint
from optimize.errors import RecipeError, Refused
from optimize.pipeline import plan
from optimize.recipe import load


def test_a_plan_needs_no_torch():
    check = "import sys, optimize.pipeline.plan; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)


@pytest.mark.parametrize(
    ("step", "sentence"),
    [
        ("quantize: {scheme: w4a16, refit: true}", "`refit` does nothing any more"),
        ("prune: {layers: 1, choose: influence}", "`choose: influence` does nothing any more"),
    ],
)
def test_what_an_old_recipe_says_in_vain_is_read_and_said(step, sentence, written, tmp_path):
    recipe = load(written(f"steps: [{{{step}}}]"))
    first = plan.made(recipe, plan.Path(recipe.model), {}, tmp_path / "out", 10**12).steps[0]
    assert sentence in first.warning


@pytest.mark.parametrize(
    ("step", "what"),
    [
        ("prune: {layers: 1}", "drop 1 layers by greedy choice"),
        ("prune: {pattern: 2:4}", "2:4 zeros by sparsegpt"),
        ("heal: {rank: 4, tokens: 24}", "least squares, then distil the original, LoRA of rank 4"),
        ("quantize: {scheme: w4a16, budget: 0.02}", "w4a16, gptq, sensitive layers keep more bits until perplexity"),
        ("quantize: {scheme: w4a16, bits: 5}", "w4a16, gptq, sensitive layers keep more bits as long as a"),
    ],
)
def test_a_step_says_what_it_will_do_and_what_it_needs(step, what, written, tmp_path):
    recipe = load(written(f"steps: [{{{step}}}]"))
    first, *_, last = plan.made(recipe, plan.Path(recipe.model), {}, tmp_path / "out", 10**12).steps
    assert first.what.startswith(what) and min(first.memory, first.disk, first.seconds) > 0
    assert (last.kind, last.what) == ("export", "vllm directory, manifest, report")


def test_layers_are_chosen_on_a_part_of_the_text_and_the_plan_counts_no_more(written, tmp_path):
    """It counted the time of a whole quantization once more, and sixteen times the tokens that sensitivity reads."""

    def seconds(samples: int, mixing: str) -> float:
        recipe = load(
            written(f"steps: [{{quantize: {{scheme: w4a16{mixing}}}}}]"),
            {"calibration.samples": str(samples), "calibration.text": "default"},
        )
        return plan.made(recipe, plan.Path(recipe.model), {}, tmp_path / "out", 10**12).steps[0].seconds

    few, many = (seconds(samples, ", bits: 5, smooth: false") - seconds(samples, "") for samples in (8, 800))
    assert 0 < few == pytest.approx(many)


LITTLE = {"calibration.tokens": "9000"}


@pytest.mark.parametrize(
    ("more", "setting", "sentence"),
    [
        ("steps: [{prune: {layers: 1}}, {heal: {tokens: 9000}}]", {}, "heal: calibration: .* of 9000 tokens, not 16"),
        ("steps: [{prune: {layers: 1}}]", {"evaluate.tokens": "9000"}, "windows of 9000 tokens, not 8"),
        ("steps: [{quantize: {scheme: w8a8}}]", LITTLE, "calibration: .* windows of 9000 tokens, not 16"),
        ("steps: [{quantize: {scheme: w8a8, method: rtn}}]", LITTLE, "calibration: .* windows of 9000 tokens, not 16"),
        ("steps: [{prune: {mlp: 0.5}}]", LITTLE, "calibration: .* windows of 9000 tokens, not 16"),
        ("steps: [{prune: {sparsity: 0.5}}]", LITTLE, "calibration: .* windows of 9000 tokens, not 16"),
        ("adapters: {tone: ADAPTER}", {"evaluate.adapter_texts": "{tone: SHORT}"}, "tone: .* of 48 tokens, not 8"),
    ],
    ids=["heal", "evaluate", "quantize", "rtn", "prune", "zeros", "adapter"],
)
def test_too_little_text_for_what_comes_last_is_refused_before_any_work(
    more, setting, sentence, written, tmp_path, adapter
):
    short = tmp_path / "short.jsonl"
    short.write_text('{"text": "a town by the river"}')
    setting = {name: value.replace("SHORT", str(short)) for name, value in setting.items()}
    recipe = load(written(more.replace("ADAPTER", str(adapter()))), setting)
    with pytest.raises(Refused, match=sentence):
        plan.made(recipe, plan.Path(recipe.model), {}, tmp_path / "out", 10**12)


@pytest.mark.parametrize("more", ["steps: [{prune: {vocabulary: used}}]", "steps: []", "export: {format: onnx}"])
def test_text_that_nothing_reads_in_windows_may_be_short(more, written, tmp_path):
    recipe = load(written(more), LITTLE)
    assert plan.made(recipe, plan.Path(recipe.model), {}, tmp_path / "out", 10**12).steps


def test_fewer_bits_than_the_groups_scales_leave_room_for_are_refused(written, tmp_path):
    recipe = load(written("steps: [{quantize: {scheme: w4a16, group: 32, bits: 4.3}}]"))
    with pytest.raises(Refused, match=r"groups of 32 take 4\.5 bits a weight, and `bits` is 4\.3"):
        plan.made(recipe, plan.Path(recipe.model), {}, tmp_path / "out", 10**12)


STRANGE = {
    "Gemma 4": ("gemma4_text", "model.embed_tokens_per_layer.weight", None),
    "GPT-2": ("gpt2", "transformer.wte.weight", "model.embed_tokens.weight"),
    "GPT-OSS": ("gpt_oss", "model.layers.0.self_attn.sinks", None),
    "DeepSeek": ("deepseek_v3", "model.layers.0.self_attn.kv_a_proj_with_mqa.weight", None),
    "Falcon-H1": ("falcon_h1", "model.layers.0.mamba.in_proj.weight", None),
}
RESHAPED = {
    "vocabulary": "steps: [{prune: {vocabulary: used}}]",
    "onnx": "export: {format: onnx}",
    "tune": "steps: [{tune: {train: TRAIN}}]\nexport: {format: adapter}",
}


@pytest.mark.parametrize("step", RESHAPED.values(), ids=RESHAPED)
@pytest.mark.parametrize(("model_type", "more", "without"), STRANGE.values(), ids=STRANGE)
def test_a_model_that_nobody_knows_is_refused_in_the_plan(step, model_type, more, without, written, tmp_path, base):
    """Trimming the vocabulary of a Gemma 4 left its second table of tokens as it was, and answered nonsense."""
    train = tmp_path / "train.jsonl"
    train.write_text("".join(json.dumps({"prompt": f"{at}", "completion": "yes"}) + "\n" for at in range(20)))
    folder = retyped(base, tmp_path / "strange", model_type, more, without)
    recipe = load(written(step.replace("TRAIN", str(train))))
    with pytest.raises(Refused, match=f"does not know models of type '{model_type}', which have {more}"):
        plan.made(recipe, folder, {}, tmp_path / "out", 10**12)


@pytest.mark.parametrize("step", RESHAPED.values(), ids=RESHAPED)
def test_a_model_of_a_new_name_that_is_laid_out_as_llama_is_taken(step, written, tmp_path, base):
    train = tmp_path / "train.jsonl"
    train.write_text("".join(json.dumps({"prompt": f"{at}", "completion": "yes"}) + "\n" for at in range(20)))
    folder = retyped(base, tmp_path / "new", "some_new_name", "model.layers.0.self_attn.q_norm.weight")
    assert plan.made(load(written(step.replace("TRAIN", str(train)))), folder, {}, tmp_path / "out", 10**12).steps


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"model_type": "ernie4_5", "use_bias": True}, r"vLLM leaves out what this ERNIE 4\.5 model has \(use_bias\)"),
        ({"model_type": "stablelm", "qk_layernorm": True}, r"vLLM leaves out what this StableLM model has"),
    ],
)
def test_what_vllm_would_leave_out_of_a_model_is_refused(more, why, written, tmp_path, base):
    """An ERNIE with biases answered otherwise in vLLM in seven places of ten."""
    folder = shutil.copytree(base, tmp_path / "strange")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **more}))
    with pytest.raises(Refused, match=why):
        plan.made(load(written("steps: [{quantize: {}}]")), folder, {}, tmp_path / "out", 10**12)
    plain = load(written("export: {format: onnx}"))
    assert plan.made(plain, folder, {}, tmp_path / "out", 10**12).steps


def test_an_adapter_on_modules_where_vllm_takes_none_is_refused(written, tmp_path, base, adapter):
    folder = shutil.copytree(base, tmp_path / "glm")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "glm4"}))
    one = adapter()
    told = json.loads((one / "adapter_config.json").read_text())
    (one / "adapter_config.json").write_text(json.dumps({**told, "target_modules": ["gate_up_proj"]}))
    with pytest.raises(Refused, match="the adapter 'one' is on gate_up_proj, where vLLM takes none on GLM-4"):
        plan.made(load(written(f"adapters: {{one: {one}}}")), folder, {}, tmp_path / "out", 10**12)


def test_vllm_is_told_how_ministral_3_scales_its_queries():
    rope = {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 16384}
    told = architectures.as_vllm_reads({"model_type": "ministral3", "rope_parameters": rope})
    assert told["llama_4_scaling"] == {"beta": 0.1, "original_max_position_embeddings": 16384}
    assert architectures.as_vllm_reads({"model_type": "llama"}) == {"model_type": "llama"}


def retyped(base, folder, model_type, more, without=None):
    """The base with another name, one tensor more, and perhaps one less."""
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    tensors = load_file(folder / "model.safetensors")
    tensors[more] = tensors["model.embed_tokens.weight"].clone()
    tensors.pop(without, None)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"task_type": "SEQ_CLS"}, "'one' classifies by a head .* it answers /v1/classify"),
        ({"trainable_token_indices": [3]}, "'one' has rows of single tokens .* push it as it is"),
        ({"peft_type": "LOHA"}, "'one' is LOHA, and LORA is taken: a server makes a LoRA of most kinds"),
        ({"init_lora_weights": "pissa"}, "which changes the base's weights too: save it again with PEFT's"),
        ({"init_lora_weights": "loftq"}, "which changes the base's weights too: train it again"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "it repeats layers of the base"),
        ({"use_qalora": True}, "it pools its input"),
        ({"r": 0}, "its rank r is 0, and not a whole number above 0"),
        ({"r": "4"}, "its rank r is '4'"),
        ({"r": 8}, "has rank 4, and 8 by its config"),
        ({"rank_pattern": {"q_proj": 2}}, "q_proj has rank 4, and 2 by its config"),
        ({"rank_pattern": {"(": 4}}, "no regular expression"),
        ({"lora_alpha": 0}, "its lora_alpha is 0, and not a finite number above 0"),
        ({"lora_alpha": math.nan}, "its lora_alpha is nan"),
        ({"alpha_pattern": {"q_proj": "8"}}, "its alpha_pattern does not give finite numbers"),
    ],
)
@pytest.mark.parametrize("step", ["merge: {adapters: [one]}", "combine: {adapters: [one, two], name: both}"])
def test_an_adapter_that_cannot_be_merged_is_refused_with_what_would_do(
    step, settings, says, written, adapter, tmp_path
):
    folder = shutil.copytree(adapter(), tmp_path / "one")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    adapters = f"one: {folder}" if "merge" in step else f"one: {folder}, two: {adapter(seed=1)}"
    recipe = load(written(f"adapters: {{{adapters}}}\nsteps: [{{{step}}}]"))
    with pytest.raises(Refused, match=says):
        plan.made(recipe, plan.Path(recipe.model), {}, tmp_path / "out", 10**12)


def test_an_adapter_of_the_embedding_is_not_combined(written, adapter, tmp_path):
    """The step stopped at it with 'A'."""
    one = adapter(target_modules=["q_proj", "embed_tokens"])
    steps = "steps: [{combine: {adapters: [one, two], name: both}}]"
    recipe = load(written(f"adapters: {{one: {one}, two: {adapter(seed=1)}}}\n{steps}"))
    with pytest.raises(Refused, match="'one' adapts the embedding and cannot be combined"):
        plan.made(recipe, plan.Path(recipe.model), {}, tmp_path / "out", 10**12)


@pytest.mark.parametrize(
    ("missing", "says"),
    [("", "its file of weights holds none"), ("lora_B", "has no lora_B beside its other half")],
)
def test_an_adapter_that_lacks_tensors_is_refused(missing, says, written, adapter, tmp_path):
    """Without any it was merged as nothing, and the export was the base."""
    folder = shutil.copytree(adapter(), tmp_path / "one")
    tensors = load_file(folder / "adapter_model.safetensors")
    left = {name: value for name, value in tensors.items() if missing and missing not in name}
    save_file(left, folder / "adapter_model.safetensors")
    recipe = load(written(f"adapters: {{one: {folder}}}\nsteps: [{{merge: {{adapters: [one]}}}}]"))
    with pytest.raises(Refused, match=says):
        plan.made(recipe, plan.Path(recipe.model), {}, tmp_path / "out", 10**12)


@pytest.mark.parametrize(
    ("one", "two", "step", "says"),
    [
        ({}, {"use_dora": True}, "adapters: [one, two]", "'two' is DoRA, .* name it first"),
        ({"use_dora": True}, {}, "adapters: [one, two], weights: [0.5, 1]", "replaces a norm .* weighted by 0.5"),
        ({"modules_to_save": ["lm_head"]}, {}, "adapters: [one], weights: [0.5]", "replaces lm_head .* by 0.5"),
        (
            {"modules_to_save": ["lm_head"]},
            {"modules_to_save": ["lm_head"]},
            "adapters: [one, two]",
            "'one' and 'two' both replace lm_head",
        ),
    ],
)
def test_adapters_that_replace_a_part_of_the_base_are_not_added_up(one, two, step, says, written, adapter, tmp_path):
    """The second of two saved heads won, and a weight of 0.5 replaced the whole head, without a word."""
    folders = f"one: {adapter(**one)}, two: {adapter(seed=1, **two)}"
    recipe = load(written(f"adapters: {{{folders}}}\nsteps: [{{merge: {{{step}}}}}]"))
    with pytest.raises(Refused, match=says):
        plan.made(recipe, plan.Path(recipe.model), {}, tmp_path / "out", 10**12)


def test_a_head_is_trained_for_an_adapter_alone_and_its_labels_are_those_of_train(written, tmp_path):
    files = {}
    for name, labels in (("train", "ab"), ("valid", "abc")):
        files[name] = tmp_path / f"{name}.jsonl"
        lines = [json.dumps({"text": "the river", "label": label}) + "\n" for label in labels * 8]
        files[name].write_text("".join(lines))

    def made(more: str, form: str = "adapter"):
        step = f"steps: [{{tune: {{method: classify, train: {files['train']}{more}}}}}]\nexport: {{format: {form}}}"
        recipe = load(written(step))
        return plan.made(recipe, plan.Path(recipe.model), {}, tmp_path / "out", 10**12)

    for more in ("", ", dora: true, rslora: true, loraplus_ratio: 16"):
        assert made(more).steps[0].what.startswith("adapter: classify on 16 examples")
    with pytest.raises(Refused, match="valid.jsonl has the label 'c', which no example of train has"):
        made(f", validation: {files['valid']}")
    with pytest.raises(Refused, match="say `export: {format: adapter}`, and tune alone"):
        made("", "vllm")
    with pytest.raises(RecipeError, match="a head is trained with a new adapter: leave `adapter` out"):
        made(", adapter: one")
    with pytest.raises(RecipeError, match="loraplus_ratio is at least 1, not 0.5"):
        made(", loraplus_ratio: 0.5")


STEPS = {
    "quantize": "steps: [{quantize: {smooth: false}}]",
    "prune": "steps: [{prune: {layers: 1}}]",
    "evaluate": "steps: [{prune: {pattern: 2:4}}]",
    "merged": "steps: [{merge: {adapters: [one]}}]",
    "tune": "steps: [{tune: {train: TRAIN}}]\nexport: {format: adapter}",
}


@pytest.mark.parametrize(
    ("made", "copies"), [("quantize", 1), ("prune", 1), ("evaluate", 2), ("merged", 1), ("tune", 0.5)]
)
def test_without_bfloat16_instructions_the_plan_counts_the_weights_that_are_copied(
    made, copies, written, tmp_path, base, adapter, monkeypatch
):
    """All weights are copied to float32 there, and the plan said a third or a fourth of what was used."""
    kind = "evaluate" if made == "merged" else made
    adapters = f"adapters: {{one: {adapter()}}}\n" if made == "merged" else ""
    train = tmp_path / "train.jsonl"
    train.write_text("".join(json.dumps({"prompt": f"{at}", "completion": "yes"}) + "\n" for at in range(20)))
    recipe = load(written(adapters + STEPS[made].replace("TRAIN", str(train))))

    def planned(sets: str) -> int:
        monkeypatch.setattr(processor, "instruction_sets", lambda: sets)
        steps = plan.made(recipe, base, {}, tmp_path / "out", 10**12).steps
        return next(step.memory for step in steps if step.kind == kind)

    shapes = Checkpoint(base).shapes
    inside = sum(math.prod(shape) for name, shape in shapes.items() if ".layers." in name)
    weights = sum(math.prod(shape) for shape in shapes.values())
    more = planned("avx2") - planned("avx2 avx512_bf16")
    least = 4 * copies * weights
    if kind == "quantize":  # one layer of three at a time
        least -= 4 * inside * 2 / 3
    assert more == pytest.approx(least, rel=0.05)


def test_a_model_without_a_tokenizer_or_with_a_broken_one_is_refused_before_any_work(written, tmp_path):
    """transformers said, after the plan, that sentencepiece was missing; or nothing but a place in a file."""
    recipe = load(written("steps: []"))
    model = shutil.copytree(recipe.model, tmp_path / "model")
    (model / "tokenizer.json").write_text("{")
    with pytest.raises(Refused, match=r"tokenizer\.json is not the JSON that a tokenizer is: fetch the model's again"):
        plan.made(recipe, model, {}, tmp_path / "out", 10**12)
    (model / "tokenizer.json").unlink()
    with pytest.raises(Refused, match=r"model has no tokenizer \(tokenizer\.json, .*\): copy the files"):
        plan.made(recipe, model, {}, tmp_path / "out", 10**12)


def test_adapters_of_an_onnx_export_are_not_in_the_plan_of_its_evaluation(written, adapter, tmp_path):
    """They are compared with PyTorch as the export is made."""
    recipe = load(written(f"adapters: {{one: {adapter()}}}\nsteps: []\nexport: {{format: onnx}}"))
    steps = plan.made(recipe, plan.Path(recipe.model), {}, tmp_path / "out", 10**12).steps
    assert "adapter" not in next(step.what for step in steps if step.kind == "evaluate")
