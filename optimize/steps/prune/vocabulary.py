"""A vocabulary cut to the languages in use: fewer rows of the embedding, and of the output layer.

What stays is what the calibration text uses, most often used first, with every token that those are merged from, the
special tokens, the chat template's, and the single bytes, so that any text can still be written. A text whose tokens
all stay is cut into the same tokens as before: byte-pair merges that were taken are all there, in the same order;
WordPiece's longest match and Unigram's best path are still there to be found.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from optimize.checkpoint.checkpoint import (
    ADAPTER_CONFIG,
    Checkpoint,
    Writer,
    adapter_config,
    adapter_tensors,
    write_adapter,
)
from optimize.checkpoint.model import settle, tokenizer
from optimize.data import text
from optimize.errors import Refused
from optimize.job import Job, Progress

ROUND = 64  # rows: what matrix kernels and vLLM like
ROWS = ("embed_tokens.weight", "lm_head.weight", "lm_head.bias")
OLDER = ("vocab.json", "merges.txt", "vocab.txt", "added_tokens.json", "special_tokens_map.json", "tokenizer.model",
         "spiece.model", "sentencepiece.bpe.model")  # fmt: skip
CHAT = [{"role": role, "content": "Hello"} for role in ("system", "user", "assistant", "user")]


def run(job: Job, progress: Progress) -> dict[str, Any]:
    settle(job.seed, job.device)
    folder, out = Path(job.model), job.folder / "model"
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise Refused(f"{folder.name} has no tokenizer.json, which is what a smaller vocabulary is written to")
    written = json.loads(file.read_text())
    words, checkpoint = tokenizer(folder), Checkpoint(folder)
    rows = int(checkpoint.config["vocab_size"])
    used = _counted(words, text.documents(job.calibration, False), progress)
    wished = job.options["vocabulary"]
    kept = chosen(written, used, None if wished == "used" else int(wished), _needed(words, folder, rows))
    kept = [token for token in kept if token < rows]
    places = {old: new for new, old in enumerate(kept)}
    out.mkdir(parents=True, exist_ok=True)
    (out / "tokenizer.json").write_text(json.dumps(rewritten(written, places), ensure_ascii=False, indent=1) + "\n")
    for name in ("tokenizer_config.json", "generation_config.json"):
        if (folder / name).is_file():
            config = json.loads((folder / name).read_text())
            (out / name).write_text(json.dumps(_moved(config, places), indent=2, ensure_ascii=False) + "\n")
    writer = Writer(out, folder)
    keep = torch.tensor(kept)
    for name in checkpoint.entries:
        tensor = checkpoint.tensor(name)
        writer.add(name, tensor[keep] if name.endswith(ROWS) and tensor.shape[0] == rows else tensor)
    writer.close({**_moved(checkpoint.config, places), "vocab_size": len(kept)})
    for name in OLDER:
        (out / name).unlink(missing_ok=True)
    changed = {}
    for name, path in job.adapters.items():
        changed[name] = _adapter(Path(path), keep, rows, job.folder / "adapters" / name)
    total, covered = sum(used.values()), sum(count for token, count in used.items() if token in places)
    return {
        "vocabulary_before": rows,
        "vocabulary": len(kept),
        "covered": round(covered / total, 5),
        "bytes_saved": checkpoint.bytes - Checkpoint(out).bytes,
        "adapters": changed,
    }


def chosen(written: Mapping[str, Any], used: Mapping[int, int], count: int | None, needed: Iterable[int]) -> list[int]:
    """The tokens that stay, in their order: what is needed, then the most used, each with all it is merged from."""
    model = written["model"]
    pieces = _pieces(model)
    parents = _parents(model, pieces)
    kept: set[int] = set()

    def family(token: int) -> set[int]:
        members, waiting = set(), [token]
        while waiting:
            member = waiting.pop()
            if member not in kept and member not in members:
                members.add(member)
                waiting += parents.get(member, ())
        return members

    for token in [*needed, *_alphabet(model, pieces)]:
        kept |= family(token)
    if count is not None and len(kept) > count:
        raise Refused(f"a vocabulary of {count} does not hold the {len(kept)} tokens that have to stay; ask for more")
    for token in sorted(used, key=lambda token: (-used[token], token)):
        more = family(token)
        if count is None or len(kept) + len(more) <= count:
            kept |= more
    for token in sorted(pieces.values()):  # whole blocks of rows; the lowest numbers are the commonest pieces
        if len(kept) % ROUND == 0:
            break
        more = family(token)
        if 0 < len(more) <= ROUND - len(kept) % ROUND:
            kept |= more
    return sorted(kept)


def rewritten(written: Mapping[str, Any], places: Mapping[int, int]) -> dict[str, Any]:
    """tokenizer.json with the tokens of `places` (old -> new) alone."""
    made = json.loads(json.dumps(written))
    model = made["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [piece for at, piece in enumerate(model["vocab"]) if at in places]
        if model.get("unk_id") is not None:
            model["unk_id"] = places[model["unk_id"]]
    else:
        pieces = model["vocab"]
        model["vocab"] = {piece: places[at] for piece, at in pieces.items() if at in places}
    if model["type"] == "BPE":
        staying = model["vocab"]
        model["merges"] = [
            merge for merge in model["merges"]
            if all(part in staying for part in _halves(merge)) and _joined(model, merge) in staying
        ]  # fmt: skip
    made["added_tokens"] = [
        {**token, "id": places[token["id"]]} for token in made.get("added_tokens") or [] if token["id"] in places
    ]
    if made.get("padding"):
        made["padding"]["pad_id"] = places[made["padding"]["pad_id"]]
    if made.get("post_processor"):
        _processor(made["post_processor"], places)
    return made


def mapping(old: Any, new: Any) -> torch.Tensor | None:
    """(new vocabulary,) of old ids, from two tokenizers; None when they have the same tokens."""
    before, after = old.get_vocab(), new.get_vocab()
    if before == after:
        return None
    if unknown := sorted(set(after) - set(before)):
        raise Refused(f"the result's tokenizer has the token {unknown[0]!r}, which the original has not")
    ids = torch.zeros(max(after.values()) + 1, dtype=torch.long)
    for token, at in after.items():
        ids[at] = before[token]
    return ids


def _counted(words: Any, texts: list[Any], progress: Progress) -> Counter[int]:
    counts: Counter[int] = Counter()
    for done, document in enumerate(texts):
        counts.update(text.tokens_of(words, document))
        if done % 50 == 0:
            progress(done, len(texts), "counting tokens")
    return counts


def _needed(words: Any, folder: Path, rows: int) -> list[int]:
    """Special tokens, those that the configs name, and the chat template's."""
    needed = set(words.all_special_ids) | set(words.get_added_vocab().values())
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            for key, value in json.loads((folder / name).read_text()).items():
                if _holds_ids(key):
                    needed |= {token for token in _flat(value) if token is not None}
    if words.chat_template:
        prompt = words.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
        needed |= set(words(prompt, add_special_tokens=False).input_ids)
    return sorted(token for token in needed if 0 <= token < rows)


def _pieces(model: Mapping[str, Any]) -> dict[str, int]:
    if model["type"] == "Unigram":
        return {piece: at for at, (piece, _) in enumerate(model["vocab"])}
    return dict(model["vocab"])


def _parents(model: Mapping[str, Any], pieces: Mapping[str, int]) -> dict[int, set[int]]:
    """token -> the tokens that any merge makes it of."""
    parents: dict[int, set[int]] = {}
    for merge in model.get("merges") or []:
        token = pieces.get(_joined(model, merge))
        if token is not None:
            parents.setdefault(token, set()).update(pieces[part] for part in _halves(merge) if part in pieces)
    return parents


def _halves(merge: Any) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else list(merge)


def _joined(model: Mapping[str, Any], merge: Any) -> str:
    left, right = _halves(merge)
    return left + right.removeprefix(model.get("continuing_subword_prefix") or "")


def _alphabet(model: Mapping[str, Any], pieces: Mapping[str, int]) -> list[int]:
    """Single bytes or characters, without which some text could not be written; and the unknown token."""
    if model.get("byte_fallback"):
        return [at for piece, at in pieces.items() if len(piece) == 6 and piece.startswith("<0x")] + _unknown(
            model, pieces
        )
    mark = model.get("continuing_subword_prefix") or ""
    return [at for piece, at in pieces.items() if len(piece.removeprefix(mark)) == 1] + _unknown(model, pieces)


def _unknown(model: Mapping[str, Any], pieces: Mapping[str, int]) -> list[int]:
    if model.get("unk_id") is not None:
        return [model["unk_id"]]
    return [pieces[model["unk_token"]]] if model.get("unk_token") in pieces else []


def _processor(processor: dict[str, Any], places: Mapping[int, int]) -> None:
    for inner in processor.get("processors") or []:
        _processor(inner, places)
    special = processor.get("special_tokens")
    for token in special.values() if isinstance(special, dict) else []:
        token["ids"] = [places[old] for old in token["ids"]]
    for end in ("sep", "cls"):
        if isinstance(processor.get(end), list):
            processor[end][1] = places[processor[end][1]]


def _moved(config: Mapping[str, Any], places: Mapping[int, int]) -> dict[str, Any]:
    """A config with its token ids where they are now."""
    made = {}
    for key, value in config.items():
        if key == "added_tokens_decoder":
            value = {str(places[int(at)]): token for at, token in value.items() if int(at) in places}
        made[key] = _at(value, places) if _holds_ids(key) else value
    return made


def _holds_ids(key: str) -> bool:
    return key.endswith(("_token_id", "_token_ids", "suppress_tokens")) or key == "bad_words_ids"


def _at(value: Any, places: Mapping[int, int]) -> Any:
    if isinstance(value, list):
        return [_at(item, places) for item in value]
    return places.get(value, value) if isinstance(value, int) else value


def _flat(value: Any) -> list[Any]:
    return [leaf for item in value for leaf in _flat(item)] if isinstance(value, list) else [value]


def _adapter(folder: Path, keep: torch.Tensor, rows: int, out: Path) -> str:
    """The adapter for the new vocabulary in `out`, where it touches the embedding or the output layer."""
    import shutil

    tensors = adapter_tensors(folder)
    touching = [name for name in tensors if "embed_tokens" in name or "lm_head" in name]
    if not touching:
        return "applies unchanged"
    config = adapter_config(folder)
    if config.get("trainable_token_indices"):
        raise Refused(
            f"the adapter in {folder} trains single tokens (trainable_token_indices), whose numbers change: merge it "
            "before trimming the vocabulary"
        )
    for name in touching:
        for axis, size in enumerate(tensors[name].shape):
            if size == rows:
                tensors[name] = tensors[name].index_select(axis, keep).contiguous()
                break
    out.mkdir(parents=True)
    write_adapter(out, tensors)
    shutil.copyfile(folder / ADAPTER_CONFIG, out / ADAPTER_CONFIG)
    return "rewritten: its rows follow the vocabulary"
