"""Captured requests become files to train on, and a card that says how much came from where.

    train.jsonl          examples, in the form that supervised jobs take
    held_out.jsonl       examples of other conversations, to measure with
    preferences.jsonl    a better and a worse answer to one question, as the method dpo takes them; if there are any
    card.json            counts, what was dropped and why, digests

The same requests, options and golden set give the same bytes. Everything here blocks, and rests between its pieces.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serve.adapters.file_thread import rest
from serve.dataset.asked_text import Asked
from serve.dataset.balance import balanced, lot, most
from serve.dataset.conversations import Captured
from serve.dataset.examples import Dropped, Example, Source, encoded, examples_of, preference, question_of
from serve.dataset.near import NearIndex, Shingles, Sketch, bared, common_shingles, sketch
from serve.files import write_whole

TRAIN = "train.jsonl"
HELD_OUT = "held_out.jsonl"
PREFERENCES = "preferences.jsonl"
CARD = "card.json"
# Requests that one build looks at, and their text; the latest are.
MOST_REQUESTS, MOST_BYTES = 100_000, 256 << 20
# Pairs of one question.
PAIRS = 4
# Hears what is being done, how much of it is done, and of how much.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Options:
    """What is wanted. `held_out` is the part of the conversations that is not trained on.

    No topic, day or asker keeps more than `balance` times its even share of the examples that there are.
    """

    adapter: str
    tenant: str
    since: float = 0.0
    until: float | None = None
    held_out: float = 0.1
    seed: int = 0
    unrated: bool = False
    max_examples: int = 10_000
    balance: float = 3.0


@dataclass(frozen=True, slots=True)
class Built:
    """What was written; paths are None where there is nothing to write. `digests` are sha256, by the files' names."""

    folder: Path
    train: Path | None
    held_out: Path | None
    preferences: Path | None
    card: Path
    counts: dict[str, int]
    digests: dict[str, str]
    described: dict[str, Any]
    # The held-out conversations with the questions' sketches: what no later build may train on.
    kept_apart: tuple[tuple[str, Sketch], ...] = field(default=(), repr=False)
    # Who asked them.
    held_out_askers: tuple[str, ...] = field(default=(), repr=False)


@dataclass(slots=True)
class _Sorted:
    """Requests on their way to be examples."""

    examples: list[Example] = field(default_factory=list)
    worse: list[Example] = field(default_factory=list)
    captured: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    adapters: Counter[str] = field(default_factory=Counter)

    def drop(self, why: Dropped, count: int = 1) -> None:
        self.dropped[why.value] += count


def build(
    rows: Iterable[Captured],
    folder: Path,
    options: Options,
    *,
    golden: Sequence[Asked] = (),
    before: Sequence[tuple[str, Sketch]] = (),
    left_out: dict[str, int] | None = None,
    progress: Progress = lambda doing, done, of: None,
    take: Callable[[int], None] = lambda nbytes: None,
) -> Built:
    """Write the files into `folder`. `rows` are a tenant's requests, the latest first; `take(nbytes)` hears of bytes
    that are about to be written, and may refuse them.

    `golden` are questions of golden sets, `before` what earlier builds held out: neither is trained on.
    """
    found = _sorted(rows, options, progress)
    _one_form(found)
    common = common_shingles([example.question_sketch for example in found.examples])
    tests = NearIndex(common, (sketch(question_of(asked)) for asked in golden))
    _decontaminate(found, tests, Dropped.GOLDEN, progress)
    _deduplicate(found, common, progress)
    held_out, rest_of = _split(found.examples, options)
    earlier = NearIndex(common, (one for _, one in before))
    apart = {conversation for conversation, _ in before}
    found.examples = [example for example in rest_of if example.conversation not in apart]
    found.drop(Dropped.HELD_OUT_BEFORE, len(rest_of) - len(found.examples))
    own = NearIndex(common, (example.question_sketch for example in held_out))
    _decontaminate(found, own, Dropped.NEAR_HELD_OUT, progress)
    _decontaminate(found, earlier, Dropped.HELD_OUT_BEFORE, progress)
    aside = {example.conversation for example in held_out} | apart
    pairs = _preferences(found, aside)
    train = _chosen(found, options)
    kept = most(held_out, max(1, int(options.held_out * options.max_examples)), options.seed)
    found.drop(Dropped.LIMIT, len(held_out) - len(kept))
    held_out = sorted(kept, key=_place)
    progress("writing", 0, 1)
    return _written(folder, options, found, train, held_out, pairs, left_out or {}, take)


def _place(example: Example) -> tuple[float, str]:
    return (example.moment, example.id)


def _sorted(rows: Iterable[Captured], options: Options, progress: Progress) -> _Sorted:
    found, size = _Sorted(), 0
    for captured in rows:
        rest()
        size += len(captured.answer) + len(json.dumps(captured.asked))
        if size > MOST_BYTES or found.captured >= MOST_REQUESTS:
            found.drop(Dropped.LIMIT)
            continue
        examples, why = examples_of(captured, options.unrated)
        found.captured += 1
        found.adapters[captured.adapter] += 1
        if why is not None:
            found.drop(why)
        for example in examples:
            (found.worse if example.source is None else found.examples).append(example)
        progress("reading", found.captured, 0)
    # What counts most is looked at first, and of that the latest.
    order = list(Source)
    found.examples.sort(
        key=lambda example: (order.index(example.source or Source.UNRATED), -example.moment, example.id)
    )
    return found


def _one_form(found: _Sorted) -> None:
    """A file holds chats or completions: those that are more."""
    chats = [example for example in found.examples if not isinstance(example.asked, str)]
    texts = [example for example in found.examples if isinstance(example.asked, str)]
    found.drop(Dropped.OTHER_FORM, min(len(chats), len(texts)))
    found.examples = chats if len(chats) >= len(texts) else texts


def _decontaminate(found: _Sorted, index: NearIndex, why: Dropped, progress: Progress) -> None:
    """Drop what asks what is in the index, or nearly."""
    kept = []
    for at, example in enumerate(found.examples):
        if not index.near(example.question_sketch):
            kept.append(example)
        progress("comparing", at, len(found.examples))
        rest()
    found.drop(why, len(found.examples) - len(kept))
    found.examples = kept


def _deduplicate(found: _Sorted, common: Shingles, progress: Progress) -> None:
    """Of what asks the same the first one stays; of what asks nearly the same if it also answers nearly the same."""
    asked: set[bytes] = set()
    kept: list[Example] = []
    index, none = NearIndex(common), common_shingles([])

    def answers(example: Example) -> Iterable[Sketch]:
        """Those to nearly the same question under the same instructions."""
        near = (kept[number] for number in index.near(example.question_sketch))
        return (other.answer_sketch for other in near if bared(other.system) == bared(example.system))

    for at, example in enumerate(found.examples):
        if example.asked_digest in asked:
            found.drop(Dropped.DUPLICATE)
        elif NearIndex(none, answers(example)).near(example.answer_sketch):
            found.drop(Dropped.NEAR_DUPLICATE)
        else:
            asked.add(example.asked_digest)
            kept.append(example)
            index.add(example.question_sketch)
        progress("looking for duplicates", at, len(found.examples))
        rest()
    found.examples = kept


def _split(examples: Sequence[Example], options: Options) -> tuple[list[Example], list[Example]]:
    """What is held out, and the rest: by conversation, by lot."""
    if not options.held_out:
        return [], list(examples)
    lots = {example.conversation: lot(options.seed, example.conversation) for example in examples}
    out = {conversation for conversation, drawn in lots.items() if drawn < options.held_out}
    if not out and len(lots) > 1:
        out = {min(lots, key=lambda conversation: (lots[conversation], conversation))}
    held_out = [example for example in examples if example.conversation in out]
    return held_out, [example for example in examples if example.conversation not in out]


def _preferences(found: _Sorted, aside: set[str]) -> list[dict[str, Any]]:
    """Pairs for questions of the part to train on, by the time of the worse answer; none of conversations `aside`."""
    good = {example.asked_digest: example for example in found.examples}
    worse: dict[bytes, list[Example]] = defaultdict(list)
    for example in sorted(found.worse, key=_place):
        if isinstance(example.asked, str) or example.conversation in aside:
            continue
        better = good.get(example.asked_digest)
        if better is None:
            continue
        others = {bared(one.answer) for one in (better, *worse[example.asked_digest])}
        if bared(example.answer) not in others and len(worse[example.asked_digest]) < PAIRS:
            worse[example.asked_digest].append(example)
    return [
        preference(good[digest].asked, good[digest].answer, example.answer)
        for digest, some in worse.items()
        for example in some
    ]


def _chosen(found: _Sorted, options: Options) -> list[Example]:
    taken = balanced(found.examples, options.balance, options.seed)
    found.drop(Dropped.BALANCE, len(found.examples) - len(taken))
    kept = most(taken, options.max_examples, options.seed)
    found.drop(Dropped.LIMIT, len(taken) - len(kept))
    return sorted(kept, key=_place)


def _written(
    folder: Path,
    options: Options,
    found: _Sorted,
    train: Sequence[Example],
    held_out: Sequence[Example],
    pairs: Sequence[dict[str, Any]],
    left_out: dict[str, int],
    take: Callable[[int], None],
) -> Built:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    contents = {
        TRAIN: encoded(example.line() for example in train),
        HELD_OUT: encoded(example.line() for example in held_out),
        PREFERENCES: encoded(pairs),
    }
    take(sum(map(len, contents.values())))
    paths: dict[str, Path | None] = dict.fromkeys(contents)
    for name, content in contents.items():
        (folder / name).unlink(missing_ok=True)
        if content:
            write_whole(folder / name, content)
            paths[name] = folder / name
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items() if content}
    counts = {"train": len(train), "held_out": len(held_out), "preferences": len(pairs)}
    card = _card(options, found, train, held_out, counts, digests, left_out)
    write_whole(folder / CARD, (json.dumps(card, indent=2, ensure_ascii=False) + "\n").encode())
    return Built(
        folder,
        paths[TRAIN],
        paths[HELD_OUT],
        paths[PREFERENCES],
        folder / CARD,
        counts,
        digests,
        card,
        tuple((example.conversation, example.question_sketch) for example in held_out),
        tuple(example.asker for example in held_out),
    )


def _card(
    options: Options,
    found: _Sorted,
    train: Sequence[Example],
    held_out: Sequence[Example],
    counts: dict[str, int],
    digests: dict[str, str],
    left_out: dict[str, int],
) -> dict[str, Any]:
    used = [*train, *held_out]
    moments = [example.moment for example in used]
    personal: Counter[str] = Counter()
    for example in used:
        personal.update(example.personal)
    return {
        "object": "data.card",
        "adapter": options.adapter,
        "tenants": [options.tenant],
        "asked": {"since": options.since, "until": options.until},
        "span": {"first": min(moments, default=None), "last": max(moments, default=None)},
        "captured": found.captured,
        "captured_by": dict(sorted(found.adapters.items())),
        "not_captured": left_out,
        "examples": counts,
        "sources": {"train": _sources(train), "held_out": _sources(held_out)},
        "dropped": {why.value: found.dropped[why.value] for why in Dropped if found.dropped[why.value]},
        "personal_data": {
            "examples": sum(bool(example.personal) for example in used),
            "blacked_out": dict(sorted(personal.items())),
        },
        "conversations": {
            "train": len({example.conversation for example in train}),
            "held_out": len({example.conversation for example in held_out}),
        },
        "askers": len({example.asker for example in train}),
        "days": len({example.day for example in train}),
        "topics": dict(Counter(example.topic for example in train).most_common()),
        "options": {
            "held_out": options.held_out,
            "seed": options.seed,
            "unrated": options.unrated,
            "max_examples": options.max_examples,
            "balance": options.balance,
        },
        "split": "by conversation: one is held out when its lot, blake2b of seed and conversation, is below held_out",
        "digests": digests,
    }


def _sources(examples: Sequence[Example]) -> dict[str, int]:
    counted = Counter(example.source for example in examples)
    return {source.value: counted[source] for source in Source}
