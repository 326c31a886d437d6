"""Which tokens of a tokenizer beside an adapter are kept with it, and which tricks are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from serve.adapters.adapter import CONFIG, NOTES, TOKENIZER, TOKENIZER_CONFIG, WEIGHTS
from serve.adapters.added_tokens import KEPT, AddedToken, added_tokens, check_added, keep_added
from serve.adapters.peft_config import read_config
from serve.errors import AdapterRejected
from tests.support.backend import FakeTokens

BASE = FakeTokens()  # its tokens are <|im_start|> and <|im_end|>, 0 and 1


def token(content: str, number: int, **flags: Any) -> dict[str, Any]:
    usual = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": number, "content": content, **usual, **flags}


def folder(path: Path, tokens: list[dict[str, Any]] | str, end: Any = None, rows: int = 32, **settings: Any) -> Path:
    path.mkdir(exist_ok=True)
    written = json.dumps({"version": "1.0", "added_tokens": tokens, "model": {"vocab": {"a": 5}}}, indent=2)
    (path / TOKENIZER).write_text(tokens if isinstance(tokens, str) else written)
    (path / TOKENIZER_CONFIG).write_text(json.dumps({"eos_token": end}))
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **settings}
    (path / CONFIG).write_text(json.dumps(config))
    save_file({"base_model.model.model.embed_tokens.weight": torch.zeros(rows, 4)}, path / WEIGHTS)
    return path


def kept(path: Path) -> list[AddedToken]:
    return added_tokens(json.loads((path / CONFIG).read_text()))


def test_tokens_that_the_base_lacks_are_kept_in_the_configuration(tmp_path):
    base = [token("<|im_start|>", 0), token("<|im_end|>", 1)]
    path = folder(tmp_path, [*base, token("<call>", 20), token("ACME-7", 21, special=False)], end="<call>")
    assert keep_added(path, path, BASE) == ""
    assert kept(path) == [
        AddedToken("<call>", 20, normalized=False, special=True, ends=True),
        AddedToken("ACME-7", 21, normalized=False),
    ]
    check_added(path, BASE)
    assert read_config(path / CONFIG).rank == 4
    again = (path / CONFIG).read_text()
    (path / TOKENIZER).unlink()
    assert keep_added(path, path, BASE) == "" and (path / CONFIG).read_text() == again, "as it comes out of a server"


def test_a_token_beyond_the_vocabulary_is_kept_where_the_adapter_has_its_row(tmp_path):
    path = folder(tmp_path, [token("<call>", 32), token("<pad>", 33)], rows=33)
    keep_added(path, path, BASE)
    assert [each.content for each in kept(path)] == ["<call>"]
    check_added(path, BASE)
    folder(tmp_path, [], **{KEPT: [{**SOUND, "number": 32}]})
    with pytest.raises(AdapterRejected) as refused:
        check_added(path, BASE)
    assert "has the number 32, and there are rows of 32 tokens" in " ".join(
        [refused.value.message, *refused.value.problems]
    )


@pytest.mark.parametrize("tokens", [[], [token("<|im_end|>", 1)], [token("<pad>", 32)], '{"model": {}}'])
def test_without_a_new_token_that_has_a_row_the_configuration_stays_as_it_is(tmp_path, tokens):
    path = folder(tmp_path, tokens)
    before = (path / CONFIG).read_bytes()
    assert keep_added(path, path, BASE) == ""
    assert (path / CONFIG).read_bytes() == before


def test_a_token_with_another_number_is_told_of(tmp_path):
    warning = keep_added(folder(tmp_path, [token("<|im_end|>", 7)]), tmp_path, BASE)
    assert warning.startswith("its tokenizer gives <|im_end|> the number 7, and the base's 1: ")


@pytest.mark.parametrize("content", ["<|im_start|>assistant", "x<|im_end|>", "a<", "hello<|im_"])
def test_a_token_that_would_swallow_what_prompts_are_built_with_is_refused(tmp_path, content):
    path = folder(tmp_path, [token(content, 20)])
    keep_added(path, path, BASE)
    with pytest.raises(AdapterRejected, match="cannot be taken") as refused:
        check_added(path, BASE)
    assert "would swallow" in " ".join([refused.value.message, *refused.value.problems])


def test_a_token_of_the_bases_cannot_be_smuggled_into_the_configuration(tmp_path):
    entry = {"content": "<|im_end|>", "number": 20, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": False, "ends": False}  # fmt: skip
    path = folder(tmp_path, [], **{KEPT: [entry]})
    with pytest.raises(AdapterRejected) as refused:
        check_added(path, BASE)
    assert "the base's own, number 1" in " ".join([refused.value.message, *refused.value.problems])


SOUND = {"content": "<x1>", "number": 20, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": False, "ends": False}  # fmt: skip


@pytest.mark.parametrize(
    ("field", "reason"),
    [
        ([{**SOUND, "content": "x" * 129}], "2 to 128 printable characters"),
        ([{**SOUND, "content": "\n\n"}], "printable"),
        ([{**SOUND, "content": "  "}], "printable"),
        ([{**SOUND, "number": -1}], "is no token"),
        ([{**SOUND, "number": True}], "is no token"),
        ([{**SOUND, "special": "yes"}], "is no token"),
        ([{"content": "<x1>"}], "is no token"),
        ([SOUND, SOUND], "a text or a number twice"),
        ([SOUND] * 1025, "1025 tokens; this server takes a list of up to 1024"),
        ("all", "a list of up to 1024"),
    ],
)
def test_tokens_that_are_none_are_refused_in_a_sentence(tmp_path, field, reason):
    folder(tmp_path, [], **{KEPT: field})
    with pytest.raises(AdapterRejected) as refused:
        read_config(tmp_path / CONFIG)
    assert reason in " ".join([refused.value.message, *refused.value.problems])


def test_megabytes_of_added_tokens_are_refused_in_a_sentence(tmp_path):
    many = folder(tmp_path, [token(f"<x{number}>", number) for number in range(20_000)])
    assert (many / TOKENIZER).stat().st_size > NOTES[TOKENIZER]
    with pytest.raises(AdapterRejected, match="more than 2 MiB of added tokens"):
        keep_added(many, many, BASE)
    for text in ('{"added_tokens": [', '{"added_tokens": ' + "[" * 100_000):
        with pytest.raises(AdapterRejected, match="not the JSON that a tokenizer is saved as"):
            keep_added(folder(tmp_path, text), tmp_path, BASE)


def test_rules_and_templates_of_a_tokenizer_are_not_read(tmp_path):
    entry = json.dumps([token("<call>", 20)])
    rules = '"normalizer": {"type": "Replace", "pattern": {"Regex": "(a+)+$"}}, "x": '
    hostile = f'{{"added_tokens": {entry}, {rules}'
    path = folder(tmp_path, hostile, chat_template="{% for i in range(10**9) %}x{% endfor %}")
    assert keep_added(path, path, BASE) == ""
    assert [each.content for each in kept(path)] == ["<call>"]
