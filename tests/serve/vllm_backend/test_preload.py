"""What is read before processes are forked is what vLLM asks for afterwards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.renderers import hf
from vllm.tokenizers.registry import cached_get_tokenizer, cached_tokenizer_from_config

if not current_platform.is_cpu():
    pytest.skip("on a CPU alone", allow_module_level=True)


@pytest.fixture
def model(tmp_path, tiny_model):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    words = Tokenizer(models.WordLevel({"where": 0, "is": 1, "it": 2, "?": 3}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="?").save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("options", [{"max_loras": 2}, {"tokenizer_mode": "slow"}])
def test_vllm_finds_the_tokenizer_that_was_read_unless_it_is_to_be_another(model, options):
    from serve.vllm_backend import preload

    preload.tokenizer(model, options)
    before = cached_get_tokenizer.cache_info()
    cached_tokenizer_from_config(EngineArgs(model=model).create_model_config())
    after = cached_get_tokenizer.cache_info()
    assert (after.hits - before.hits, after.misses - before.misses) == (
        (0, 1) if "tokenizer_mode" in options else (1, 0)
    )


@pytest.mark.parametrize("has", ["", "preprocessor_config.json", "processor_class"])
def test_the_tokenizer_of_a_model_of_text_is_not_read_again_for_its_chat_template(model, monkeypatch, has):
    from serve.vllm_backend import preload

    (Path(model) / "chat_template.jinja").write_text("{{ messages[0].content }}")
    if has.endswith(".json"):
        (Path(model) / has).write_text("{}")
    elif has:
        config = Path(model) / "tokenizer_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), has: "LlavaProcessor"}))
    asked = []
    monkeypatch.setattr(hf, "cached_get_processor", lambda name, **_: asked.append(name))
    preload.tokenizer(model, {})
    vllm_config = EngineArgs(model=model).create_model_config()
    tokenizer = cached_tokenizer_from_config(vllm_config)
    template = hf.resolve_chat_template(tokenizer, None, None, model_config=vllm_config)
    assert template == "{{ messages[0].content }}"
    assert asked == ([model] if has else [])


def test_what_a_tokenizer_was_made_of_is_not_held_a_second_time(model):
    from serve.vllm_backend import preload

    vocabulary = {"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}
    Qwen2Tokenizer(vocab=vocabulary, merges=[("a", "b")]).save_pretrained(model)
    preload.tokenizer(model, {})
    tokenizer = cached_tokenizer_from_config(EngineArgs(model=model).create_model_config())
    assert (len(tokenizer._vocab), len(tokenizer._merges)) == (0, 0)
    assert tokenizer("abba")["input_ids"] == [2, 1, 0]
    assert tokenizer.get_vocab() == vocabulary
