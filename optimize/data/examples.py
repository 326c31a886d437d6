"""Examples to train on, a JSON object a line, as OpenAI's fine-tuning takes them; each problem has its line and reason.

    chat         {"messages": [{"role", "content", "weight"?}, ...], "tools"?: [...]}
    completion   {"prompt": "...", "completion": "..."}
    preference   {"input": {"messages": [...]}, "preferred_output": [...], "non_preferred_output": [...]}
    rating       {"messages": [...], "label": true | false}    whether the last answer is good; not OpenAI's, TRL's
    labelled     {"text": "...", "label": "..."}                what a text is, for a classification head

A file is read line by line, without torch and without a tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from optimize.data.messages import Problem, messages_of, tools_of
from optimize.errors import Refused

FEWEST = 10  # examples, as OpenAI asks for
LONGEST = 16 << 20  # bytes of a line
LISTED = 100  # problems that are kept
SHOWN = 3  # problems in one message
REASON = 300  # characters of a problem, which may quote the file
LABELS = 127  # of a head; what a server takes
LABEL = 128  # characters of its name

FORMATS = {
    "chat": "supervised",
    "completion": "supervised",
    "preference": "dpo",
    "rating": "kto",
    "labelled": "classify",
}
KEYS = {
    "chat": ("messages", "tools", "parallel_tool_calls"),
    "completion": ("prompt", "completion"),
    "preference": ("input", "preferred_output", "non_preferred_output"),
    "rating": ("messages", "label", "tools", "parallel_tool_calls"),
    "labelled": ("text", "label"),
}


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation; `learned` says of each message whether the model learns to give it."""

    messages: tuple[dict[str, Any], ...]
    learned: tuple[bool, ...]
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Preference:
    """Two answers to the same conversation, the better one first."""

    preferred: Chat
    other: Chat


@dataclass(frozen=True, slots=True)
class Rating:
    """A conversation whose last answer is good, or is not."""

    chat: Chat
    good: bool


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text, and what it is."""

    text: str
    label: str


Example = Chat | Completion | Preference | Rating | Labelled


@dataclass(slots=True)
class Found:
    """What a file holds: how many good examples, their format, and what is wrong with the others."""

    examples: int = 0
    format: str | None = None
    problems: list[tuple[int | None, str]] = field(default_factory=list)
    problem_count: int = 0
    bytes: int = 0
    longest: int = 0  # bytes of a line
    labels: set[str] = field(default_factory=set)

    @property
    def message(self) -> str:
        """The problems as OpenAI says them, or nothing."""
        if not self.problem_count:
            return ""
        said = [reason if line is None else f"Line {line}: {reason}" for line, reason in self.problems[:SHOWN]]
        more = self.problem_count - len(said)
        return f"Invalid file format. {'; '.join(said)}" + (f"; and {more} more problems" if more > 0 else "")

    def plain(self) -> dict[str, Any]:
        return {
            "examples": self.examples,
            "format": self.format,
            "problems": [{"line": line, "message": reason} for line, reason in self.problems],
            "problem_count": self.problem_count,
            "message": self.message,
        }

    def add(self, line: int | None, reason: str) -> None:
        self.problem_count += 1
        if len(self.problems) < LISTED:
            self.problems.append((line, reason))


def checked(path: Path, method: str, fewest: int = FEWEST) -> Found:
    """Everything that is wrong with a file for this method; Refused when it cannot be read."""
    found = Found()
    for line, made, size in _lines(path, method):
        found.bytes, found.longest = found.bytes + size, max(found.longest, size)
        if isinstance(made, str):
            found.add(line, made)
            continue
        form = type(made).__name__.lower()
        found.format = found.format or form
        if form != found.format:
            found.add(line, f"is a {form} example, and those before are {found.format}; a file holds one format")
            continue
        found.examples += 1
        if isinstance(made, Labelled):
            found.labels.add(made.label)
    if len(found.labels) > LABELS:
        found.add(None, f"The file has {len(found.labels)} labels, and a head has at most {LABELS}")
    if method == "classify" and fewest > 1 and found.examples >= fewest and len(found.labels) < 2:
        found.add(None, "The file has one label, so there is nothing to tell apart")
    if found.examples < fewest and not found.problem_count:
        found.add(None, f"The file has {found.examples} examples, but must have at least {fewest}")
    return found


def examples(path: Path, method: str) -> Iterator[tuple[int, Example]]:
    """The examples with their lines; Refused at the first that is wrong."""
    for line, made, _ in _lines(path, method):
        if isinstance(made, str):
            raise Refused(f"{path.name}, line {line}: {made}")
        yield line, made


def _lines(path: Path, method: str) -> Iterator[tuple[int, Example | str, int]]:
    """(line, its example or what is wrong with it, its bytes)."""
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(LONGEST + 1):
                number += 1
                if len(line) > LONGEST:
                    yield number, f"is above {LONGEST >> 20} MB", len(line)
                    while line and not line.endswith(b"\n"):
                        line = file.readline(LONGEST)
                    continue
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if not line.strip():
                    continue
                try:
                    yield number, _example(line, method), len(line)
                except Problem as problem:
                    yield number, _short(str(problem)), len(line)
    except OSError as error:
        raise Refused(f"the examples in {path} cannot be read: {error.strerror or error}") from error


def _short(reason: str) -> str:
    return reason if len(reason) <= REASON else reason[: REASON - 3] + "..."


def _example(line: bytes, method: str) -> Example:
    try:
        row = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Problem(f"is not JSON: {' '.join(str(error).split())}") from error
    if isinstance(row, list):
        raise Problem("is a list; the file holds one JSON object a line (JSONL), not one list of them")
    if not isinstance(row, dict):
        raise Problem("is not a JSON object")
    form = _format(row, method)
    if FORMATS[form] != method:
        raise Problem(f"is a {form} example, which the method {FORMATS[form]} takes, not {method}")
    if unknown := sorted(set(row) - set(KEYS[form])):
        raise Problem(f"has the key {unknown[0]!r}; a {form} example has {', '.join(KEYS[form])}")
    made: dict[str, Callable[[dict[str, Any]], Example]] = {
        "chat": _chat, "completion": _completion, "preference": _preference, "rating": _rating, "labelled": _labelled,
    }  # fmt: skip
    return made[form](row)


def _format(row: dict[str, Any], method: str) -> str:
    if "text" in row and ("label" in row or method == "classify"):
        return "labelled"
    if "label" in row:
        return "rating"
    others = {form: keys for form, keys in KEYS.items() if form != "labelled"}
    for form, keys in others.items():
        if keys[0] in row:
            return form
    for keys in others.values():
        if set(keys) & set(row):
            raise Problem(f'is missing the key "{keys[0]}"')
    raise Problem('is missing the key "messages" (or "prompt" and "completion", or "input" of a preference)')


def _chat(row: dict[str, Any]) -> Chat:
    messages, learned = messages_of(row["messages"], "messages")
    if messages[-1]["role"] != "assistant":
        raise Problem("its last message has to be from the assistant")
    if not any(learned):
        raise Problem("has no assistant message with a weight above 0, so nothing is learned from it")
    return Chat(messages, learned, tools_of(row))


def _completion(row: dict[str, Any]) -> Completion:
    for key in KEYS["completion"]:
        if key not in row:
            raise Problem(f'is missing the key "{key}"')
        if not isinstance(row[key], str):
            raise Problem(f'"{key}" has to be a string')
    if not row["completion"]:
        raise Problem('"completion" is empty')
    return Completion(row["prompt"], row["completion"])


def _preference(row: dict[str, Any]) -> Preference:
    given = row["input"]
    if not isinstance(given, dict) or "messages" not in given:
        raise Problem('"input" has to be an object with "messages"')
    if unknown := sorted(set(given) - set(KEYS["chat"])):
        raise Problem(f'"input" has the key {unknown[0]!r}; it has {", ".join(KEYS["chat"])}')
    asked, _ = messages_of(given["messages"], "input.messages")
    if asked[-1]["role"] == "assistant":
        raise Problem("the last message of its input is from the assistant; the outputs answer a user or a tool")
    tools = tools_of(given)
    answers = [_answer(row, key, asked, tools) for key in KEYS["preference"][1:]]
    if answers[0] == answers[1]:
        raise Problem('"preferred_output" and "non_preferred_output" are the same')
    return Preference(*answers)


def _rating(row: dict[str, Any]) -> Rating:
    if "messages" not in row:
        raise Problem('is missing the key "messages"')
    if not isinstance(row["label"], bool):
        raise Problem('"label" has to be true or false')
    chat = _chat(row)
    return Rating(Chat(chat.messages, (*(False for _ in chat.messages[1:]), True), chat.tools), row["label"])


def _labelled(row: dict[str, Any]) -> Labelled:
    for key in KEYS["labelled"]:
        if key not in row:
            raise Problem(f'is missing the key "{key}"')
        if not isinstance(row[key], str) or not row[key]:
            raise Problem(f'"{key}" has to be a text that is not empty')
    if len(row["label"]) > LABEL or not row["label"].isprintable():
        raise Problem(f'"label" has to be printable, and of up to {LABEL} characters')
    return Labelled(row["text"], row["label"])


def _answer(row: dict[str, Any], key: str, asked: tuple[dict[str, Any], ...], tools: tuple[Any, ...]) -> Chat:
    if key not in row:
        raise Problem(f'is missing the key "{key}"')
    messages, _ = messages_of(row[key], key)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise Problem(f'"{key}" has to be one message from the assistant')
    return Chat((*asked, *messages), (*(False for _ in asked), True), tools)
