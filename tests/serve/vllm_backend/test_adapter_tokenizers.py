"""The prompts of an adapter that adds tokens are encoded with them, and nobody else's."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from vllm.exceptions import VLLMValidationError
from vllm.tokenizers import hf

from serve.adapters.added_tokens import KEPT
from serve.asgi.exchange import leased
from serve.errors import AdapterRejected
from serve.vllm_backend.adapter_tokenizers import AdapterTokenizers

SIZE = 271


@pytest.fixture(scope="module")
def plain() -> Any:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = ["the harbour was quiet that morning <call>"] * 9
    made.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=SIZE - 1, initial_alphabet=alphabet))
    made.add_special_tokens(["<|im_end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>")


class Renderer:
    """What is used of vLLM's."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = hf.maybe_make_thread_pool(hf.get_cached_tokenizer(tokenizer), 2)
        self.model_config = SimpleNamespace(get_vocab_size=lambda: SIZE)
        self._executor = ThreadPoolExecutor(1)

    def get_tokenizer(self) -> Any:
        return self.tokenizer

    def get_eos_token_id(self) -> int | None:
        return int(self.tokenizer.eos_token_id)

    def validate_token_ids(self, token_ids: list[int], *, parameter: str | None = None) -> None:
        if max(token_ids) >= SIZE:
            raise VLLMValidationError("out of vocabulary")

    def _tokenize_prompt(self, text: str) -> list[int]:
        return list(self.get_tokenizer()(text)["input_ids"])

    def _decode(self, ids: list[int]) -> str:
        return str(self.get_tokenizer().decode(ids))


class Base:
    vocabulary = SIZE
    control_tokens = frozenset({"<|im_end|>"})

    def token_number(self, token: str) -> int | None:
        return {"<|im_end|>": SIZE - 1}.get(token)


def adapter(folder: Path, *tokens: tuple[str, int], **flags: Any) -> Path:
    usual = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": False,
        "ends": False,
    }
    entries = [{"content": content, "number": number, **usual, **flags} for content, number in tokens]
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", KEPT: entries}))
    rows = {"base_model.model.model.embed_tokens.weight": torch.zeros(SIZE + 2, 4)}
    save_file(rows, folder / "adapter_model.safetensors")
    return folder


async def encoded(renderer: Renderer, model: str | None, text: str) -> list[int]:
    """As vLLM does, in one of its threads, within a lease of this adapter."""
    token = leased.set(model)
    try:
        return await renderer._tokenize_prompt_async(text)  # type: ignore[attr-defined, no-any-return]
    finally:
        leased.reset(token)


async def test_prompts_of_the_adapter_alone_have_its_tokens(plain, tmp_path):
    renderer = Renderer(plain)
    tokenizers = AdapterTokenizers(renderer)
    tokenizers.add("tone@1", adapter(tmp_path / "a", ("<call>", SIZE), ("<end>", SIZE + 1), ends=True), Base())
    text = "the <call> harbour"
    own, others, bases = await asyncio.gather(
        encoded(renderer, "tone@1", text), encoded(renderer, "other@1", text), encoded(renderer, None, text)
    )
    assert own.count(SIZE) == 1 and len(own) < len(bases)
    assert others == bases == list(plain(text)["input_ids"])
    leased.set("tone@1")
    assert await renderer._async_tokenizer_decode(own) == text
    assert renderer.get_eos_token_id() == SIZE + 1
    renderer.validate_token_ids([SIZE + 1])
    for wrong in (SIZE + 2, -1):
        with pytest.raises(VLLMValidationError, match=f"Token id {wrong} is out of vocabulary"):
            renderer.validate_token_ids([5, wrong])
    tokenizers.remove("tone@1")
    assert renderer.get_eos_token_id() == SIZE - 1
    assert await encoded(renderer, "tone@1", text) == bases
    with pytest.raises(VLLMValidationError):
        renderer.validate_token_ids([SIZE])


def test_numbers_that_this_base_would_not_give_are_refused(plain, tmp_path):
    tokenizers = AdapterTokenizers(Renderer(plain))
    with pytest.raises(AdapterRejected, match=f"number {SIZE + 1}, and this base's tokenizer gives it {SIZE}"):
        tokenizers.add("tone@1", adapter(tmp_path / "a", ("<call>", SIZE + 1)), Base())
    with pytest.raises(AdapterRejected, match="cannot be taken"):
        tokenizers.add("tone@1", adapter(tmp_path / "b", ("<call>", SIZE + 2)), Base())
    tokenizers.add("tone@1", adapter(tmp_path / "c"), Base())
    assert tokenizers.of("tone@1") is None


def test_a_copy_leaves_the_bases_tokenizer_as_it_is(plain, tmp_path):
    renderer = Renderer(plain)
    before = renderer.tokenizer.get_vocab(), len(renderer.tokenizer)
    tokenizers = AdapterTokenizers(renderer)
    tokenizers.add("tone@1", adapter(tmp_path / "a", ("<call>", SIZE), special=True), Base())
    own = tokenizers.of("tone@1")
    assert own.max_token_id == SIZE and own.convert_tokens_to_ids("<call>") == SIZE
    assert own.decode([SIZE], skip_special_tokens=True) == ""
    assert (renderer.tokenizer.get_vocab(), len(renderer.tokenizer)) == before
    assert renderer.tokenizer.convert_tokens_to_ids("<call>") != SIZE
