"""Runs of tokens as numbers, and which runs many recent prompts share: chat template, system prompt, few-shot head.

    words = Words.of(prompt_tokens, numbers)       # a whole number is one symbol, whatever its digits
    runs = words.runs(RUN)
    shared.learn(runs)                             # each prompt once
    words.kept(words.own(shared.among(runs)))      # the tokens that are the prompt's own

Counts halve every HALF_LIFE prompts, so the table always knows the recent prompts and nothing else. It is a hash table
of fixed size (416 KiB) that keeps what comes again, as Misra and Gries' does: a run that was seen once gives its place
to the next that needs it. A run has WAYS places to lie in, for no other run covers the last token of an opening: were
it lost, that token would be a part of every prompt, and a new opening a drift of all of them. Runs are kept as hashes,
not as tokens.

A frequent wording ("which of the following is") is no opening. The prompts that hold it come and go by chance: were it
shared while SHARED recent ones do, it would be cut out of prompts for some hundred requests and left in for the next,
which is a drift that the cutting makes itself. So what SHARED prompts hold is shared only in one of three cases, none
of which wording is in: what a part of FIXED of the prompts held at the time of `fix` is shared for ever; what MOST of
the last LATELY prompts hold is, as another system prompt, or what all did of the eight up to the prompt that AHEAD are
after, as one that has just gone; and what covers at least STRETCH symbols without a gap, in runs that the same prompts
hold (they have one count), is, as an opening that few tenants have. Some of its runs may have lost their places.

What is held so often may also reach from an opening into the words that many prompts begin with: "... please.\n\nWhat".
Were that word cut out, it would come back into the prompts with the next opening. So runs that follow one after which
QUESTION of the prompts have nothing that is fixed are not fixed either, unless they are RUN or more, or reach to the
prompt's end: an opening that has variants goes on in one of them in all prompts. The same holds towards the front.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sized
from ctypes import addressof
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from serve.drift.native import SharedRunsView, at, native

# Tokens of a run that says what is shared: long enough that prompts do not share it by grammar.
RUN = 6
# Prompts after which a count is worth half: what is counted is the last 185 or so.
HALF_LIFE = 128.0
# Below so many recent prompts a run is not shared. It is few: of a prompt below it, no detector sees much either way.
SHARED = 4.0
# Of two pools of 10,000 questions no run but the template's was in more than 0.12 of them, and runs that were in more
# than 0.006 covered no more than 44 symbols without a gap.
FIXED = 0.25
MOST = 8
STRETCH = 64
# The part of the prompts with nothing fixed behind a run from which on a question begins there; the prompts looked at.
QUESTION, LOOKED_BACK = 0.1, 64
# Counts that differ by less are of the same prompts.
_ALIKE = np.float32(1.001)
# Prompts after a prompt that help to say what it shares: what is new is shared from its first appearance on.
AHEAD = 8
LATELY, BEFORE = AHEAD + 1, np.uint32(0xFF00)  # bits of `_held_lately`: that prompt and those after it, or before it
# Tokens of a prompt that are looked at: as many at its beginning as at its end.
MOST_TOKENS = 8192
NUMBER = -1
_EDGE = -2
# Of a signature: tokens of a run, and orders of all runs.
SHORT_RUN, MINIMA = 3, 12
_PLACES, WAYS = 15, 4
_LARGEST = 1e30
_GROWTH = 2 ** (1 / HALF_LIFE)
_FACTORS = np.random.Generator(np.random.PCG64(1997)).integers(1, 1 << 63, RUN, np.uint64) * 2 + 1
_TURNS = np.random.Generator(np.random.PCG64(1997)).integers(1, 1 << 63, MINIMA, np.uint64) * 2 + 1


class Words(NamedTuple):
    """A prompt: its tokens, and the symbols that are compared, a number being one symbol.

    symbol_of: (tokens,) the place of each token's symbol, or None where each token is its own. at: where all of it lies
    in one piece (`SharedRuns.read`); 0 where it does not.
    """

    tokens: NDArray[np.int32]
    symbols: NDArray[np.int64]
    symbol_of: NDArray[np.intp] | None
    at: int = 0

    @classmethod
    def of(cls, tokens: ArrayLike, numbers: NDArray[np.bool_] | None = None) -> Self:
        """numbers: whether each token of the vocabulary is made of digits, with a False at the end for all others."""
        ids = np.asarray(tokens, np.int64)
        if skipped(ids):
            ids = np.concatenate((ids[: MOST_TOKENS // 2], ids[-MOST_TOKENS // 2 :]))
        symbols, symbol_of = ids, None
        if numbers is not None and len(ids):
            digits = numbers[np.minimum(ids.view(np.uint64), np.uint64(len(numbers) - 1))]
            if digits.any():
                begins = ~digits
                begins[1:] |= begins[:-1]
                begins[0] = True
                symbols = np.where(digits, NUMBER, ids)[begins]
                symbol_of = np.add.accumulate(begins, dtype=np.intp) - 1
        return cls(ids.astype(np.int32), symbols, symbol_of)

    def runs(self) -> NDArray[np.uint64]:
        """(symbols + 2 - RUN + 1,): the runs of RUN symbols, where the two edges of the prompt are symbols too."""
        edged = np.empty(len(self.symbols) + 2, np.int64)
        edged[0] = edged[-1] = _EDGE
        edged[1:-1] = self.symbols
        return hashed_runs(edged, RUN)

    def own(self, shared: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """(symbols,): which lie in no run of `shared`, a mask over `runs`."""
        if not shared.any():
            return np.ones(len(self.symbols), np.bool_)
        return ~_covered(shared)[1:-1]

    def kept(self, own: NDArray[np.bool_]) -> NDArray[np.int32]:
        """The tokens of these symbols."""
        return self.tokens[own if self.symbol_of is None else own[self.symbol_of]]


class Own(NamedTuple):
    """What a prompt does not share with recent ones, and the runs that it shares.

    minima: (MINIMA,) of its symbols (`signature`), none of no symbol. words: one of them is no number. whole: it shares
    nothing.
    """

    tokens: NDArray[np.int32]
    shared_runs: NDArray[np.uint64]
    minima: NDArray[np.uint64]
    words: bool
    whole: bool


def _covered(runs: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(runs + RUN - 1,): the symbols, edges included, that lie in a run of these; none of no run."""
    change = np.zeros(len(runs) + RUN, np.int32)
    change[: len(runs)] = runs
    change[RUN:] -= runs
    covered: NDArray[np.bool_] = np.add.accumulate(change)[:-1] > 0
    return covered if len(runs) else covered[:0]


def skipped(tokens: Sized) -> int:
    """How many tokens in the middle of a prompt are not looked at."""
    return max(0, len(tokens) - MOST_TOKENS)


def hashed_runs(symbols: NDArray[np.int64], length: int) -> NDArray[np.uint64]:
    """Every run of `length` symbols as one number; none, if there are fewer symbols (multilinear hashing)."""
    words = np.ascontiguousarray(symbols).view(np.uint64)
    count = len(words) - length + 1
    if count <= 0:
        return np.zeros(0, np.uint64)
    # Each row is a run: rows overlap in memory.
    runs: NDArray[np.uint64] = (
        np.ndarray((count, length), np.uint64, words, strides=words.strides * 2) @ _FACTORS[:length]
    )
    return runs


def signature(symbols: NDArray[np.int64]) -> NDArray[np.uint64]:
    """(MINIMA,): the least hash of its runs in each of so many orders (MinHash); a short text is a run of its own."""
    if not len(symbols):
        return np.zeros(0, np.uint64)
    runs = hashed_runs(symbols, min(SHORT_RUN, len(symbols)))
    # One order of all runs a row, by all but the last 16 bits.
    mixed = (runs ^ (runs >> np.uint64(31))) * _TURNS[:, None]
    return np.minimum.reduce(mixed, axis=1) >> np.uint64(16)


class SharedRuns:
    """How many recent prompts hold each run, as far as it comes again. numbers: as `Words.of` takes them.

    stretch: symbols that runs cover at least to be shared, whoever holds them; with RUN every single one is, as in
    earlier releases.
    """

    def __init__(self, numbers: NDArray[np.bool_] | None = None, stretch: int = STRETCH) -> None:
        self.stretch = stretch
        self._numbers = None if numbers is None else np.ascontiguousarray(numbers)
        self._native, self._view = native(), SharedRunsView()
        # Of the prompt that was read last: how many tokens, symbols and runs it has. And what `split` counts.
        self._sizes, self._found = np.zeros(3, np.int64), np.zeros(4, np.int64)
        self._tags = np.zeros(1 << _PLACES, np.uint32)
        # In units that grow with every prompt, so that older ones count less.
        self._counts = np.zeros(1 << _PLACES, np.float32)
        self._unit = 1.0
        self._raw = 0  # prompts so far
        # Of each run, the last 16 bits of the number of the prompt that held it last; in the upper half, which of the
        # 16 prompts up to that one did: it is the lowest bit. And what is shared for ever.
        self._lately = np.zeros(1 << _PLACES, np.uint32)
        self._fixed = np.zeros(1 << _PLACES, np.bool_)
        self._is_fixed = False
        # The runs of the last prompts, until it is.
        self._recent: deque[NDArray[np.uint64]] = deque(maxlen=LOOKED_BACK)

        # They stay where they are.
        self._view.tags = at(self._tags)
        self._view.counts = at(self._counts)
        self._view.factors = at(_FACTORS)
        self._view.lately, self._view.fixed = at(self._lately), at(self._fixed)
        self._view.turns = at(_TURNS)
        if self._numbers is not None:
            self._view.numbers, self._view.vocabulary = at(self._numbers), len(self._numbers) - 1
        self._view_at = addressof(self._view)
        self._sizes_at, self._found_at = at(self._sizes), at(self._found)

    def read(self, tokens: NDArray[np.int64]) -> tuple[Words, NDArray[np.uint64]]:
        """The words of one prompt, and its runs, which are learned."""
        if self._native is None:
            words = Words.of(tokens, self._numbers)
            runs = words.runs()
            self.learn(runs)
            return words, runs
        self._grow()
        n = min(len(tokens), MOST_TOKENS)
        # Symbols, where each token's is, runs, and tokens of half a word.
        piece = np.empty(3 * n + (n + 1) // 2, np.int64)
        begin, tokens_at = at(piece), at(tokens)
        self._native.learn(
            self._view_at, tokens_at, len(tokens), self._unit, self._raw, begin + 24 * n, begin,
            begin + 8 * n, begin + 16 * n, self._sizes_at,
        )  # fmt: skip
        _, symbols, runs = self._sizes.tolist()
        words = Words(piece[3 * n :].view(np.int32)[:n], piece[:symbols], piece[n : 2 * n], begin)
        held = piece[2 * n : 2 * n + runs].view(np.uint64)
        self._remember(held)
        return words, held

    def split(self, words: Words, runs: NDArray[np.uint64]) -> Own:
        """What of a prompt is its own now."""
        if self._native is None or not words.at:
            shared = self.among(runs)
            own = words.own(shared)
            rest = words.symbols[own]
            tokens, has_words = words.kept(own), bool((rest != NUMBER).any())
            return Own(tokens, runs[shared], signature(rest), has_words, len(rest) == len(words.symbols))
        n, begin = len(words.tokens), words.at
        self._sizes[:] = n, len(words.symbols), len(runs)
        piece = np.empty(MINIMA + len(runs) + (n + 1) // 2, np.uint64)
        out = at(piece)
        self._native.own(
            self._view_at, SHARED * self._unit, self._raw, self.stretch, begin + 24 * n, begin,
            begin + 8 * n, begin + 16 * n, self._sizes_at, out + 8 * (MINIMA + len(runs)), out + 8 * MINIMA, out,
            self._found_at,
        )  # fmt: skip
        tokens, shared_runs, rest, has_words = self._found.tolist()
        own_tokens = piece[MINIMA + len(runs) :].view(np.int32)[:tokens]
        known = piece[MINIMA : MINIMA + shared_runs]
        return Own(own_tokens, known, piece[: MINIMA if rest else 0], bool(has_words), rest == len(words.symbols))

    def _grow(self) -> None:
        """What is counted from now on weighs more."""
        self._raw += 1
        self._unit *= _GROWTH
        if self._unit > _LARGEST:
            self._counts /= np.float32(self._unit)
            self._unit = 1.0

    def _remember(self, runs: NDArray[np.uint64]) -> None:
        if not self._is_fixed and self.stretch > RUN:
            self._recent.append(runs)

    def learn(self, runs: NDArray[np.uint64]) -> None:
        """Count the runs of one prompt; a run that it holds twice counts once."""
        self._grow()
        self._remember(runs)
        places, found = self._where(runs)
        here, lately = places[found], np.uint32(1 << 16 | self._raw & 0xFFFF)
        self._lately[here] = self._held_lately(here) << np.uint32(16) | lately
        self._counts[here] = self._counts[here] + np.float32(self._unit)
        runs, groups = runs[~found], places[~found]
        first = np.zeros(len(groups), np.bool_)
        first[np.unique(groups, return_index=True)[1]] = True
        self._put(runs[first], groups[first])
        for i in np.flatnonzero(~first):  # after another one of its group
            if not self._where(runs[i : i + 1])[1].any():
                self._put(runs[i : i + 1], groups[i : i + 1])

    def _put(self, runs: NDArray[np.uint64], groups: NDArray[np.intp]) -> None:
        """Give each run, of another group each, a place there, if one has no run that was seen more than once."""
        places, worth = self._least(groups)
        free = worth < np.float32(self._unit)
        places = places[free]
        self._tags[places], self._counts[places] = _tags(runs[free]), np.float32(self._unit)
        self._lately[places] = np.uint32(1 << 16 | self._raw & 0xFFFF)

    def _least(self, groups: NDArray[np.intp]) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
        """The place of each group whose run counts least, and what it counts; one that is fixed is kept."""
        places = groups[:, None] + np.arange(WAYS)
        counts = np.where(self._fixed[places], np.float32(np.inf), self._counts[places])
        return groups + counts.argmin(1), counts.min(1)

    def _where(self, runs: NDArray[np.uint64]) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
        """The place of each run, or the first of its group, and whether it has one."""
        groups = (runs >> np.uint64(64 - _PLACES)).astype(np.intp) // WAYS * WAYS
        same = self._tags[groups[:, None] + np.arange(WAYS)] == _tags(runs)[:, None]
        return groups + same.argmax(1), same.any(1)

    def _held_lately(self, places: NDArray[np.intp]) -> NDArray[np.uint32]:
        """Which of the last 16 prompts held the runs there: the newest one is the lowest bit."""
        word = self._lately.take(places)
        ago = (np.uint32(self._raw & 0xFFFF) - word) & np.uint32(0xFFFF)
        held: NDArray[np.uint32] = (word >> np.uint32(16)) << np.minimum(ago, 16) & np.uint32(0xFFFF)
        return held

    def among(self, runs: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """(runs,), of one prompt: which of them are shared now."""
        places, found = self._where(runs)
        counts, fixed = self._counts.take(places), self._fixed.take(places)
        held: NDArray[np.bool_] = found & ((counts >= np.float32(SHARED * self._unit)) | fixed)
        if self.stretch == RUN or not held.any():
            return held
        lately = self._held_lately(places)
        newly = np.bitwise_count(lately & np.uint32((1 << LATELY) - 1)) >= MOST
        shared = held & (fixed | newly | (lately & BEFORE == BEFORE))
        # A prompt that is one with what others hold is a popular prompt, and has no opening of few.
        if not _covered(held).all():
            for run in self._stretches(np.flatnonzero(held & ~shared), counts):
                shared[run] = True
        return shared

    def _stretches(self, rest: NDArray[np.intp], counts: NDArray[np.float32]) -> Iterator[NDArray[np.intp]]:
        """Those of the runs `rest` that the same prompts hold, and that cover at least `stretch` symbols together."""
        if len(rest) * RUN < self.stretch:
            return
        rest = rest[counts[rest].argsort(kind="stable")]
        begin = 0
        while begin < len(rest):
            end = begin + int(counts[rest[begin:]].searchsorted(counts[rest[begin]] * _ALIKE, "right"))
            runs, begin = np.sort(rest[begin:end]), end
            for stretch in np.split(runs, np.flatnonzero(np.diff(runs) > RUN) + 1):
                if stretch[-1] - stretch[0] + RUN >= self.stretch:
                    yield stretch

    def fix(self) -> None:
        """What a part of FIXED of the recent prompts hold is shared from now on, whatever comes; once."""
        if self._is_fixed or self.stretch == RUN:
            return
        self._is_fixed = True
        # In units: what a run counts that all prompts hold.
        most = (1 - _GROWTH**-self._raw) / (1 - 1 / _GROWTH)
        self._fixed |= self._counts >= np.float32(max(SHARED, FIXED * most) * self._unit)
        self._fixed[self._questions()] = False
        self._recent.clear()

    def _questions(self) -> list[int]:
        """The places of what is fixed and reaches from an opening into the words after it, or before it."""
        prompts = []
        for runs in self._recent:
            places, found = self._where(runs)
            prompts.append((places, found & self._fixed[places]))
        reaching = list[int]()
        for step in (1, -1):
            turned = [(places[::step], fixed[::step]) for places, fixed in prompts]
            before, ended = np.zeros((2, 1 << _PLACES), np.int64)
            for places, fixed in turned:
                np.add.at(before, places[:-1][fixed[:-1]], 1)
                np.add.at(ended, places[:-1][fixed[:-1] & ~fixed[1:]], 1)
            question = ended > QUESTION * before
            for places, fixed in turned:
                for end in np.flatnonzero(fixed[:-1] & ~fixed[1:]).tolist():
                    begin = max(0, end - RUN + 1)
                    gaps = np.flatnonzero(~fixed[begin:end])
                    begin += int(gaps[-1]) + 1 if len(gaps) else 0
                    first = np.flatnonzero(question[places[begin:end]])
                    if len(first):
                        reaching += places[begin + int(first[0]) + 1 : end + 1].tolist()
        return reaching

    def fix_as(self, state: Mapping[str, NDArray]) -> None:
        """What was fixed in the table whose `state()` this is; nothing where single runs are shared."""
        if not state.get("is_fixed") and self.stretch > RUN:
            return
        self._fixed[:], self._is_fixed = False, self.stretch > RUN
        self._recent.clear()
        if self._is_fixed:
            chosen = state["fixed"]
            groups = state["places"][chosen].astype(np.intp) // WAYS * WAYS
            for i, tag in enumerate(state["tags"][chosen]):
                known = self._tags[groups[i] : groups[i] + WAYS] == tag
                place = groups[i] + known.argmax() if known.any() else self._least(groups[i : i + 1])[0][0]
                self._counts[place] *= self._tags[place] == tag
                self._tags[place], self._fixed[place] = tag, True

    def state(self) -> dict[str, NDArray]:
        """All of it as arrays."""
        places = np.flatnonzero((self._counts > 0) | self._fixed)
        return {
            "places": places.astype(np.uint16),
            "tags": self._tags[places],
            "counts": self._counts[places] / np.float32(self._unit),
            "lately": self._lately[places],
            "fixed": self._fixed[places],
            "is_fixed": np.array(self._is_fixed),
            "raw": np.array(self._raw),
        }

    @classmethod
    def from_state(
        cls, state: Mapping[str, NDArray], numbers: NDArray[np.bool_] | None = None, stretch: int = STRETCH
    ) -> Self:
        """The table whose `state()` this was."""
        self = cls(numbers, stretch)
        places = state["places"].astype(np.intp)
        self._tags[places], self._counts[places] = state["tags"], state["counts"]
        # Earlier releases wrote none of these, and had seen enough.
        if "fixed" in state:
            self._lately[places], self._fixed[places] = state["lately"], state["fixed"]
        self._is_fixed, self._raw = bool(state.get("is_fixed", False)), int(state.get("raw", 1 << 16))
        return self


def own_tokens(prompts: Iterable[ArrayLike], shared: SharedRuns) -> Iterator[NDArray[np.int32]]:
    """Of each prompt the tokens that it does not share with those around it, in order; a new `shared` learns them."""
    ahead = []
    known = [np.array(prompt, np.int64) for prompt in prompts]
    for prompt in known:
        shared.read(prompt)
    shared.fix()
    for prompt in known:
        ahead.append(shared.read(prompt))
        if len(ahead) > AHEAD:
            yield shared.split(*ahead.pop(0)).tokens
    for words, runs in ahead:
        yield shared.split(words, runs).tokens


def _tags(runs: NDArray[np.uint64]) -> NDArray[np.uint32]:
    """What each run is known by at its place."""
    return (runs >> np.uint64(16)).astype(np.uint32)
