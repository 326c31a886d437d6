"""Tokens that a trainer added to the base's tokenizer, from the tokenizer.json beside an adapter.

Those that the base does not have are kept in the adapter's configuration, so that its digest is of them too: prompts of
the adapter are encoded with them, and its answers decoded. Nothing else of its tokenizer is read: no rule, no template.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from serve.adapters import saved_modules
from serve.adapters.adapter import CONFIG, NOTES, TOKENIZER, TOKENIZER_CONFIG, WEIGHTS, Adapter
from serve.adapters.tensors import read_header
from serve.adapters.untrusted import open_plain, parse_json, rejected
from serve.errors import AdapterRejected
from serve.names import shown

# The field of adapter_config.json.
KEPT = "loradock_added_tokens"
MAX_TOKENS, MAX_CHARS = 1024, 128


@dataclass(frozen=True, slots=True)
class AddedToken:
    """One token. The flags are those of the tokenizers library; `ends` says that an answer ends with it."""

    content: str
    number: int
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True
    special: bool = False
    ends: bool = False


class Tokenizer(Protocol):
    """What is asked of the base, of its tokenizer."""

    @property
    def vocabulary(self) -> int: ...
    @property
    def control_tokens(self) -> frozenset[str]: ...
    def token_number(self, token: str) -> int | None: ...


def added_tokens(settings: Mapping[str, Any]) -> list[AddedToken]:
    """Those that an adapter's configuration keeps, which was checked."""
    return [AddedToken(**entry) for entry in settings.get(KEPT) or ()]


def control_tokens(base: Tokenizer, adapter: Adapter | None) -> frozenset[str]:
    """What is one token wherever it stands in a text for this adapter, or for the base: its own, and no other's."""
    return base.control_tokens.union(adapter.checks.get("added_tokens", ()) if adapter else ())


def keep_added(folder: Path, into: Path, base: Tokenizer) -> str:
    """Write the tokens beside the adapter in `folder` that the base lacks into the configuration in `into`.

    One for which there is no row of an embedding was never trained, and is left out. Answers a warning, if a token has
    another number in the base's tokenizer.
    """
    tokens = _read(folder)
    new = [token for token in tokens if base.token_number(token.content) is None]
    if new:
        rows = _rows(into, base)
        new = [token for token in new if token.number < rows]
    renumbered = [token for token in tokens if base.token_number(token.content) not in (None, token.number)]
    if new:
        with open_plain(into / CONFIG) as file:
            settings = parse_json(file.read(), CONFIG)
        if isinstance(settings, dict):
            (into / CONFIG).write_text(json.dumps({**settings, KEPT: [asdict(token) for token in new]}, indent=2))
    if not renumbered:
        return ""
    first = renumbered[0]
    return (
        f"its tokenizer gives {shown(first.content)} the number {first.number}, and the base's "
        f"{base.token_number(first.content)}: prompts are encoded as the base encodes them"
    )


def check_added(folder: Path, base: Tokenizer) -> None:
    """AdapterRejected, unless the tokens that its configuration keeps are new to the base and disturb none of its own.

    The configuration was inspected.
    """
    with open_plain(folder / CONFIG) as file:
        tokens = added_tokens(parse_json(file.read(), CONFIG))
    if not tokens:
        return
    special, rows = base.control_tokens, _rows(folder, base)
    problems = []
    for token in tokens:
        text = shown(token.content)
        if token.number >= rows:
            problems.append(f"the token {text} has the number {token.number}, and there are rows of {rows} tokens")
        if (number := base.token_number(token.content)) is not None:
            problems.append(f"the token {text} is the base's own, number {number}")
        elif clash := next((each for each in special if _overlap(token.content, each)), None):
            problems.append(f"the token {text} would swallow {shown(clash)}, which the base's prompts are built with")
    if problems:
        raise rejected(problems, "the tokens that this adapter adds cannot be taken; rename them and train it again")


def _rows(folder: Path, base: Tokenizer) -> int:
    """Of how many tokens there are rows of an embedding, the base's or the adapter's."""
    with open_plain(folder / WEIGHTS) as file:
        tensors = read_header(file)
    with open_plain(folder / CONFIG) as file:
        settings = parse_json(file.read(), CONFIG)
    stated = settings if isinstance(settings, dict) and not list(saved_modules.setting_problems(settings)) else {}
    return max(base.vocabulary, saved_modules.rows_of(tensors, stated))


def _overlap(token: str, special: str) -> bool:
    """Where both could be read, the one that begins first is, and then the longer one."""
    return special in token or any(token.endswith(special[:count]) for count in range(1, len(special)))


def setting_problems(raw: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the types of the field."""
    kept = raw.get(KEPT)
    if kept is None:
        return
    if not isinstance(kept, list) or len(kept) > MAX_TOKENS:
        count = len(kept) if isinstance(kept, list) else shown(kept)
        yield f"{KEPT} has {count} tokens; this server takes a list of up to {MAX_TOKENS}"
        return
    for entry in kept:
        if not _is_sound(entry):
            yield f"{KEPT} holds {shown(entry)}, which is no token: texts have 2 to {MAX_CHARS} printable characters"
    if not any(_is_sound(entry) is False for entry in kept):
        texts, numbers = {entry["content"] for entry in kept}, {entry["number"] for entry in kept}
        if len(texts) < len(kept) or len(numbers) < len(kept):
            yield f"{KEPT} has a text or a number twice"


def _is_sound(entry: Any) -> bool:
    if not isinstance(entry, dict) or entry.keys() != {field.name for field in fields(AddedToken)}:
        return False
    content, number, *flags = (entry[field.name] for field in fields(AddedToken))
    text = isinstance(content, str) and 2 <= len(content) <= MAX_CHARS and content.isprintable() and content.strip()
    return bool(text) and type(number) is int and 0 <= number < 1 << 31 and all(type(flag) is bool for flag in flags)


def _read(folder: Path) -> list[AddedToken]:
    """Of a tokenizer.json, which begins with the tokens that were added; none where there is no such file."""
    if not (folder / TOKENIZER).is_file():
        return []
    text = _text(folder / TOKENIZER)
    _, found, rest = text.partition('"added_tokens":')
    if not found:
        return []
    try:
        entries, _ = json.JSONDecoder().raw_decode(rest.lstrip())
    except (ValueError, RecursionError):
        if len(text.encode()) < NOTES[TOKENIZER]:
            raise AdapterRejected(
                f"{TOKENIZER} is not the JSON that a tokenizer is saved as; send it as it was saved"
            ) from None
        raise AdapterRejected(
            f"{TOKENIZER} has more than {NOTES[TOKENIZER] >> 20} MiB of added tokens, which no tokenizer needs: send "
            "the adapter without it, or train with fewer"
        ) from None
    end = _end(folder)
    return list(_tokens(entries, end)) if isinstance(entries, list) else []


def _tokens(entries: Sequence[Any], end: str | None) -> Iterator[AddedToken]:
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    for entry in entries:
        match entry:
            case {"content": str(content), "id": int(number)}:
                stated = {flag: entry[flag] for flag in flags if type(entry.get(flag)) is bool}
                yield AddedToken(content, number, **stated, ends=content == end)


def _end(folder: Path) -> str | None:
    """The token that its tokenizer_config.json ends a text with."""
    if not (folder / TOKENIZER_CONFIG).is_file():
        return None
    try:
        settings = json.loads(_text(folder / TOKENIZER_CONFIG))
    except (ValueError, RecursionError):
        return None
    end = settings.get("eos_token") if isinstance(settings, dict) else None
    end = end.get("content") if isinstance(end, dict) else end
    return end if isinstance(end, str) else None


def _text(path: Path) -> str:
    with open_plain(path) as file:
        return file.read(NOTES[path.name]).decode("utf-8", "replace")
