"""Examples as tokens, and which of them are learned: what the model would have to generate, and no more.

A turn's prompt is the chat template's text up to it with its generation prompt, exactly what a server sends; what the
template writes behind it, up to the token that ends the turn, is learned. Turns whose prompts continue one another are
one sequence; where a template rewrites earlier turns, each turn is a sequence of its own. Behind a text with a label
stands the label's number, as the next token would: it is what is learned, and nothing reads it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from optimize.checkpoint.model import tokenizer
from optimize.data import examples as read
from optimize.data.examples import Chat, Completion, Example, Labelled, Preference, Rating
from optimize.errors import Refused

Span = tuple[str, bool]  # a piece of text, and whether it is learned
SHOWN = 3


@dataclass(frozen=True, slots=True)
class Tokens:
    """A sequence of tokens, and for each whether it is learned."""

    ids: array[int]
    learned: array[int]

    @property
    def answers(self) -> int:
        return sum(self.learned)


# One sequence that is learned; or two, of which the first is better; or one that is rated, and its prompt with the
# answer to another.
Unit = tuple[Tokens, ...]


@dataclass(frozen=True, slots=True)
class Encoded:
    """A file's `count` examples; `cut` of them were longer than the model reads and end there. `good` are their
    ratings."""

    units: list[Unit]
    count: int
    cut: int
    good: list[bool] = field(default_factory=list)

    @property
    def longest(self) -> int:
        """Tokens of the longest unit."""
        return max(sum(len(tokens.ids) for tokens in unit) for unit in self.units)


class Encoder:
    """Tokenizes examples for the model in `folder`, at most `longest` tokens each; `labels` are those of its head."""

    def __init__(self, folder: Path, longest: int, labels: Sequence[str] = ()) -> None:
        self.words = tokenizer(folder)
        self.labels = tuple(labels)
        self._longest = longest
        self._ends = self._turn_ends(folder)

    def file(self, path: Path, method: str) -> Encoded:
        """Every example of a file; Refused when nothing of an answer is left within the length."""
        units: list[Unit] = []
        good: list[bool] = []
        count = 0
        cut = 0
        unlearnable = []
        for line, example in read.examples(path, method):
            try:
                made = self.units(example)
            except Refused as refused:
                raise Refused(f"{path.name}, line {line}: {refused.message}") from refused
            count += 1
            cut += any(len(tokens.ids) > self._longest for unit in made for tokens in unit)
            kept = self._learnable(made)
            if not kept:
                unlearnable.append(line)
            units += kept
            if kept and isinstance(example, Rating):
                good.append(example.good)
        if unlearnable:
            first = ", ".join(map(str, unlearnable[:SHOWN])) + (" ..." if len(unlearnable) > SHOWN else "")
            raise Refused(
                f"{path.name}: nothing of the answer is within {self._longest} tokens in {len(unlearnable)} examples, "
                f"on line {first}; shorten them, or raise max_length"
            )
        if good:
            units = [(mine, self._cut(_with_answer_of(mine, units[at - 1][0]))) for at, (mine,) in enumerate(units)]
        return Encoded(units, count, cut, good)

    def too_long(self, path: Path, method: str) -> Iterator[tuple[int, str]]:
        """(line, why) of each example of which nothing would be learned, since its answer begins behind the length."""
        for line, example in read.examples(path, method):
            units = self.units(example)
            if not self._learnable(units):
                tokens = max(len(tokens.ids) for unit in units for tokens in unit)
                yield (
                    line,
                    f"has {tokens:,} tokens, and its answer begins behind the first {self._longest:,}, which are those "
                    "that are trained on: shorten what stands before the answer, or leave the example out",
                )

    def _learnable(self, units: Sequence[Unit]) -> list[Unit]:
        """Those of which something is learned within the length, cut there."""
        cut = [tuple(self._cut(tokens) for tokens in unit) for unit in units]
        return [unit for unit in cut if all(any(tokens.learned[1:]) for tokens in unit)]

    def text(self, text: str) -> list[int]:
        """Plain text, as the engine begins it."""
        ids = list(self.words(text, verbose=False).input_ids)
        if ids and ids[-1] == self.words.eos_token_id != getattr(self.words, "bos_token_id", None):
            ids.pop()  # a tokenizer that ends every text
        return ids

    def answers(self, prompt: str, answers: Sequence[str]) -> tuple[list[int], list[list[int]]]:
        """A prompt, as a chat where the model has one, and what may stand behind it."""
        if self.words.chat_template:
            chat = Chat(({"role": "user", "content": prompt},), (False,))
            return self._ids(self._text(chat, 1, True)), [self._ids(answer) for answer in answers]
        return self.text(f"Question: {prompt}\nAnswer:"), [self._ids(f" {answer}") for answer in answers]

    def units(self, example: Example) -> list[Unit]:
        if isinstance(example, Completion):
            return [(self._completion(example),)]
        if isinstance(example, Preference):
            return [tuple(self._chat(side)[-1] for side in (example.preferred, example.other))]
        if isinstance(example, Rating):
            return [(self._chat(example.chat)[-1],)]
        if isinstance(example, Labelled):
            return [(self._labelled(example),)]
        return [(tokens,) for tokens in self._chat(example)]

    def _labelled(self, example: Labelled) -> Tokens:
        if example.label not in self.labels:
            raise Refused(f"has the label {example.label!r}, which no example of train has")
        text = self.text(example.text)
        if not text:
            raise Refused("has a text without a token")
        return Tokens(array("i", [*text, self.labels.index(example.label)]), array("b", [*(0 for _ in text), 1]))

    def _completion(self, example: Completion) -> Tokens:
        prompt = self.text(example.prompt)
        answer = [*self._ids(example.completion), self.words.eos_token_id]
        return Tokens(array("i", prompt + answer), array("b", [0] * len(prompt) + [1] * len(answer)))

    def _chat(self, chat: Chat) -> list[Tokens]:
        """A sequence for the turns whose prompts continue one another."""
        if not self.words.chat_template:
            raise Refused("the model has no chat template, which `messages` need: give `prompt` and `completion`")
        sequences: list[list[Span]] = []
        so_far = ""
        for at, learned in enumerate(chat.learned):
            if not learned:
                continue
            prompt = self._text(chat, at, True)
            whole = self._text(chat, at + 1, False)
            if not whole.startswith(prompt):
                raise Refused(
                    "the chat template writes an assistant's message otherwise than behind its generation prompt: "
                    "give `prompt` and `completion`"
                )
            answer = self._ended(whole[len(prompt) :])
            if so_far and prompt.startswith(so_far):
                sequences[-1] += [(prompt[len(so_far) :], False), (answer, True)]
            else:
                sequences.append([(prompt, False), (answer, True)])
            so_far = prompt + answer
        return [self._spans(spans) for spans in sequences]

    def _text(self, chat: Chat, count: int, prompt: bool) -> str:
        """The chat template's text of the first `count` messages."""
        known = "developer" in str(self.words.chat_template)
        messages = [
            message if known or message["role"] != "developer" else {**message, "role": "system"}
            for message in chat.messages[:count]
        ]
        tools = list(chat.tools) or None
        try:
            text: str = self.words.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=prompt
            )
        except Exception as error:  # jinja's, and raise_exception of templates
            raise Refused(f"the chat template does not take it: {' '.join(str(error).split())[:200]}") from error
        return text

    def _ended(self, answer: str) -> str:
        """The answer up to and with what ends the turn; with the end of text where the template has no such token."""
        bare = answer.rstrip()
        if any(bare.endswith(end) for end in self._ends):
            return bare
        return answer + (self.words.eos_token or "")

    def _spans(self, spans: Sequence[Span]) -> Tokens:
        """Tokenized as one text, as a server does, unless a token would lie on both sides of a border."""
        whole = "".join(text for text, _ in spans)
        made = self._aligned(whole, spans)
        if made is None:
            parts = [(self._ids(text), learned) for text, learned in spans]
            ids = [token for part, _ in parts for token in part]
            made = ids, [int(learned) for part, learned in parts for _ in part]
        return Tokens(array("i", made[0]), array("b", made[1]))

    def _aligned(self, whole: str, spans: Sequence[Span]) -> tuple[list[int], list[int]] | None:
        if not getattr(self.words, "is_fast", False):
            return None
        encoded = self.words(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        borders: list[tuple[int, int]] = []
        end = 0
        for text, learned in spans:
            end += len(text)
            borders.append((end, int(learned)))
        learned_tokens, place = [], 0
        for start, stop in encoded.offset_mapping:
            while place < len(borders) - 1 and start >= borders[place][0]:
                place += 1
            if stop > borders[place][0]:
                return None
            learned_tokens.append(borders[place][1])
        return encoded.input_ids, learned_tokens

    def _cut(self, tokens: Tokens) -> Tokens:
        if self.labels and len(tokens.ids) > self._longest:  # a label stays
            text = self._longest - 1
            return Tokens(tokens.ids[:text] + tokens.ids[-1:], tokens.learned[:text] + tokens.learned[-1:])
        return Tokens(tokens.ids[: self._longest], tokens.learned[: self._longest])

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.words(text, add_special_tokens=False, verbose=False).input_ids
        return ids

    def _turn_ends(self, folder: Path) -> set[str]:
        """The tokens at which generation stops, as text."""
        from transformers import GenerationConfig

        ids = {self.words.eos_token_id}
        if (folder / "generation_config.json").is_file():
            more = GenerationConfig.from_pretrained(folder).eos_token_id
            ids |= set(more if isinstance(more, list) else [more])
        return {text for token in ids if token is not None and (text := self.words.decode([token]))}


def _with_answer_of(mine: Tokens, other: Tokens) -> Tokens:
    """The prompt of one with the answer of another."""
    prompt, begin = mine.learned.index(1), other.learned.index(1)
    return Tokens(mine.ids[:prompt] + other.ids[begin:], mine.learned[:prompt] + other.learned[begin:])
