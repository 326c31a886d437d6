"""A GGUF file's words as a tokenizer that transformers and vLLM read.

Two kinds: byte-level BPE (`gpt2`), whose file names the rule by which text is cut first, and SentencePiece's BPE
(`llama`), whose merges are had from the scores. A rule that is not known here is refused: the model would get other
tokens than it was trained on, and nobody would see why it is worse. The rules: llama.cpp's `src/llama-vocab.cpp`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from serve.errors import ConfigError
from serve.models.gguf.file import GGUF

NORMAL = 1
CONTROL = 3
USER = 4

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}|{_O200K_REST}"
)
_TEKKEN = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|{_O200K_REST}"
# By `tokenizer.ggml.pre`: expressions that cut the text, one after the other.
RULES: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "dbrx", "smaug-bpe"), (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), (_QWEN2,)),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jina-en"), (_GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), (r"\p{N}", _GPT2)),
    "gpt-4o": (_GPT4O,),
    "tekken": (_TEKKEN,),
}


def save(file: GGUF, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, with the chat template if the file has one."""
    tokens = file.array("tokenizer.ggml.tokens", str)
    kinds = file.metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise ConfigError(f"{file.path.name} has {len(tokens)} words and a list of kinds of another length")
    vocabulary = {word: number for number, word in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        raise ConfigError(f"{file.path.name} has a word twice in its vocabulary")
    rows = file.tensors["token_embd.weight"].shape[0] if "token_embd.weight" in file.tensors else len(tokens)
    if len(tokens) > rows:
        raise ConfigError(f"{file.path.name} has {len(tokens)} words and an embedding of {rows}: fetch it again")
    model = file.text("tokenizer.ggml.model")
    if model == "gpt2":
        made = _byte_level(file, vocabulary)
    elif model == "llama":
        made = _sentencepiece(file, vocabulary)
    else:
        raise ConfigError(f"{file.path.name} has a tokenizer of the kind {model!r}: gpt2 and llama are read")
    _add(made, tokens, kinds)
    special = {name: _word(file, tokens, name) for name in ("bos", "eos", "unknown", "padding")}
    before, after = (file.metadata.get(f"tokenizer.ggml.add_{name}_token") for name in ("bos", "eos"))
    bos = special["bos"] if (model == "llama" if before is None else before is True) else None
    _put_around(made, vocabulary, bos, special["eos"] if after is True else None)
    made.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": file.whole(f"{file.text('general.architecture')}.context_length"),
        **{f"{name}_token": word for name, word in special.items() if word and name in ("bos", "eos")},
    }
    config |= {"unk_token": special["unknown"]} if special["unknown"] else {}
    config |= {"pad_token": special["padding"] or special["eos"]} if special["padding"] or special["eos"] else {}
    template = file.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        (folder / "chat_template.jinja").write_text(template)
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def ends(file: GGUF) -> list[int]:
    """Token ids at which an answer ends: the file's end of text, of a turn and of a message, and what is named so."""
    tokens = file.array("tokenizer.ggml.tokens", str)
    named = {"<|im_end|>", "<|eot_id|>", "<|endoftext|>", "<end_of_turn>", "<|end|>", "<|eom_id|>", "<|end_of_text|>"}
    kinds = file.metadata.get("tokenizer.ggml.token_type") or []
    found = [file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    found += [number for number, word in enumerate(tokens) if word in named and kinds[number : number + 1] == [CONTROL]]
    return [number for number in dict.fromkeys(found) if isinstance(number, int) and 0 <= number < len(tokens)]


def _byte_level(file: GGUF, vocabulary: dict[str, int]) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    rule = file.metadata.get("tokenizer.ggml.pre", "gpt-2")
    if rule not in RULES:
        raise ConfigError(
            f"{file.path.name} cuts text by the rule {rule!r}, which is not known here: serve its original checkpoint"
        )
    merges = []
    for line in file.array("tokenizer.ggml.merges", str):
        first, _, second = line.partition(" ")
        if first + second not in vocabulary or first not in vocabulary or second not in vocabulary:
            raise ConfigError(f"{file.path.name} merges {line[:40]!r}, which are not words of its vocabulary")
        merges.append((first, second))
    # Llama 3 and its kin take a word that is in the vocabulary as it is.
    whole = rule in ("llama3", "llama-v3", "llama-bpe", "falcon3", "tekken")
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=whole))
    cuts = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in RULES[rule]]
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([*cuts, bytes_])
    made.decoder = decoders.ByteLevel()
    return made


def _sentencepiece(file: GGUF, vocabulary: dict[str, int]) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = file.array("tokenizer.ggml.scores", float)
    if len(scores) != len(vocabulary):
        raise ConfigError(f"{file.path.name} has {len(vocabulary)} words and {len(scores)} scores")
    found = []
    for word, number in vocabulary.items():
        cuts = [(word[:at], word[at:]) for at in range(1, min(len(word), 128))]
        pairs = [pair for pair in cuts if pair[0] in vocabulary and pair[1] in vocabulary]
        pairs.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        found += [(-scores[number], number, pair) for pair in pairs]
    found.sort(key=lambda one: one[:1])
    unknown = next((word for word, number in vocabulary.items() if number == file.metadata.get(UNKNOWN_ID)), None)
    made = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[pair for *_, pair in found],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = file.metadata.get("tokenizer.ggml.add_space_prefix", True) is True
    spaces = [normalizers.Replace(" ", "▁")]
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *spaces] if prefix else spaces)
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)] if prefix else back)
    return made


UNKNOWN_ID = "tokenizer.ggml.unknown_token_id"


def _add(made: Any, tokens: list[str], kinds: list[int]) -> None:
    """Words that are never cut: those of control do not come from a text, but from a template."""
    from tokenizers import AddedToken

    for word, kind in zip(tokens, kinds, strict=True):
        if kind in (CONTROL, USER):
            made.add_tokens([AddedToken(word, special=kind == CONTROL, normalized=False)])


def _put_around(made: Any, vocabulary: Mapping[str, int], bos: str | None, eos: str | None) -> None:
    from tokenizers import processors

    if bos or eos:
        single = [*([bos] if bos else []), "$A", *([eos] if eos else [])]
        pair = [*single, *(part if part != "$A" else "$B" for part in single)]
        special = [(word, vocabulary[word]) for word in {bos, eos} if word]
        made.post_processor = processors.TemplateProcessing(
            single=single, pair=[f"{part}:1" if at >= len(single) else part for at, part in enumerate(pair)],
            special_tokens=special,
        )  # fmt: skip


def _word(file: GGUF, tokens: list[str], name: str) -> str | None:
    number = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
    return tokens[number] if isinstance(number, int) and 0 <= number < len(tokens) else None
