"""What a prompt shares with recent ones at its beginning and its end: a template, instructions, few-shot examples.

    read = shared.read(prompt_tokens)              # each prompt once, in order
    shared.split(read).tokens                      # once AHEAD more were read: the tokens that are the prompt's own

The last LOOKED_BACK prompts are known by hashes of what each begins and ends with. What most of those that begin with
the same RUN symbols have in common is their opening, where they are many (OFTEN of all), or where it is long (STRETCH).
Some may have more in common, as where a name stands in the middle of an opening: what most of those have is a part of
it, if they are many or it is LONG. And it is what nearly all have that came just before, or just after: so a new
opening is known at once. Prompts that are the same altogether do not count: a popular prompt has no opening. A whole
number is one symbol, whatever its digits.

A frequent wording ("Which of the following is") comes and goes by chance among the recent prompts, so that less than
most have it in common. Hashes of all beginnings could be undone, token by token: they are in memory alone. After a
restart the prompts that follow say what is shared.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Symbols that prompts begin or end with alike, so that one looks for more: more than they share by grammar.
RUN = 6
LOOKED_BACK = 64
# Prompts after a prompt that help to say what it shares: what is new is shared from its first appearance on.
AHEAD = 8
# Other prompts, at least, that share something; the part of all that is many, and the part of some that is most.
SHARED = 4
OFTEN, MOST = 1 / 4, 3 / 4
# The part that goes on alike: what a sixth do is wording, whose share comes near a quarter now and then.
SEVERAL = 1 / 3
# Symbols of what few have in common, and of what some of those have that others have not; and which part they are.
STRETCH, LONG = 64, 16
SOME = 1 / 10
# Tokens of a prompt that are looked at: as many at its beginning as at its end.
MOST_TOKENS = 8192
NUMBER = -1
# Of a signature: tokens of a run, and orders of all runs.
SHORT_RUN, MINIMA = 3, 12
# Openings, and endings, that are known of earlier prompts.
MOST_ENDS = 8
_FACTORS = np.random.Generator(np.random.PCG64(1997)).integers(1, 1 << 63, MOST_TOKENS, np.uint64) * 2 + 1
_TURNS = np.random.Generator(np.random.PCG64(1997)).integers(1, 1 << 63, MINIMA, np.uint64) * 2 + 1


class Words(NamedTuple):
    """A prompt: its tokens, and the symbols that are compared, a number being one symbol.

    symbol_of: (tokens,) the place of each token's symbol, or None where each token is its own.
    """

    tokens: NDArray[np.int32]
    symbols: NDArray[np.int64]
    symbol_of: NDArray[np.intp] | None

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

    def kept(self, begin: int, end: int) -> NDArray[np.int32]:
        """The tokens of the symbols from `begin` to `end`."""
        if self.symbol_of is not None:
            begin, end = self.symbol_of.searchsorted((begin, end)).tolist()
        return self.tokens[begin:end]


class Read(NamedTuple):
    """A prompt that was read, as the `number`th. begin, end: what it begins and ends with."""

    words: Words
    number: int
    begin: _Hashes
    end: _Hashes

    @classmethod
    def of(cls, tokens: ArrayLike, numbers: NDArray[np.bool_] | None = None, number: int = 0) -> Self:
        words = Words.of(tokens, numbers)
        return cls(words, number, _Hashes.of(words.symbols), _Hashes.of(words.symbols[::-1]))


class _Hashes(NamedTuple):
    """Of the first 1, 2, ... symbols. run: of the first RUN, 0 where there are fewer; whole: of all."""

    each: NDArray[np.uint32]
    run: int
    whole: int

    @classmethod
    def of(cls, symbols: NDArray[np.int64]) -> Self:
        n = len(symbols)
        sums = np.add.accumulate(symbols.view(np.uint64) * _FACTORS[:n])
        each = (sums >> np.uint64(32)).astype(np.uint32)
        return cls(each, int(each[RUN - 1]) if n >= RUN else 0, int(sums[-1]) if n else 0)

    def alike(self, other: _Hashes, guess: int) -> int:
        """How many symbols two prompts have in common: where the hashes of all up to there are the same. To look at the
        `guess` first is faster."""
        mine, its = self.each, other.each
        n = min(len(mine), len(its))
        if 0 < guess < n and mine[guess - 1] == its[guess - 1] and mine[guess] != its[guess]:
            return guess
        return int(np.count_nonzero(self.each[:n] == other.each[:n]))


class Own(NamedTuple):
    """What a prompt does not share with recent ones, and the runs of what it shares.

    minima: (MINIMA,) of its symbols (`signature`), none of no symbol. words: one of them is no number. whole: it shares
    nothing.
    """

    tokens: NDArray[np.int32]
    shared_runs: NDArray[np.uint64]
    minima: NDArray[np.uint64]
    words: bool
    whole: bool


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


class SharedEnds:
    """What the recent prompts of one version share. numbers: as `Words.of` takes them."""

    def __init__(self, numbers: NDArray[np.bool_] | None = None) -> None:
        # What earlier prompts began and ended with alike: symbols, and the hash of all of them; the latest last.
        self.openings: tuple[tuple[int, int], ...] = ()
        self.endings: tuple[tuple[int, int], ...] = ()
        self.numbers = numbers
        self._recent: deque[Read] = deque(maxlen=LOOKED_BACK + AHEAD + 1)
        self._count = 0
        self._usual = (0, 0)  # what the last prompt shared

    def read(self, tokens: ArrayLike) -> Read:
        """The next prompt."""
        self._count += 1
        read = Read.of(tokens, self.numbers, self._count)
        self._recent.append(read._replace(words=_NO_WORDS))
        return read

    def split(self, read: Read) -> Own:
        """What of a prompt is its own, as far as the prompts around it say."""
        words, n = read.words, len(read.words.symbols)
        number = read.number
        mine, its_end = read.begin, read.end
        begins = [each for each in self._recent if each.begin.run == mine.run and each.number != number]
        ends = [each for each in self._recent if each.end.run == its_end.run and each.number != number]
        begin = end = 0
        if begins or ends:
            others = [each for each in self._recent if each.number != number and each.begin.whole != mine.whole]
            least, usual = OFTEN * len(others), self._usual
            begun = [
                (each.number, mine.alike(each.begin, usual[0])) for each in begins if each.begin.whole != mine.whole
            ]
            ended = [
                (each.number, its_end.alike(each.end, usual[1])) for each in ends if each.begin.whole != mine.whole
            ]
            begin = _common(number, begun, least) if mine.run else 0
            end = min(_common(number, ended, least), n - begin) if its_end.run else 0
        self._usual = begin, end
        self.openings = _with_latest(self.openings, begin, mine)
        self.endings = _with_latest(self.endings, end, its_end)
        rest = words.symbols[begin : n - end]
        known = _NO_RUNS
        if begin or end:
            known = np.concatenate(
                [hashed_runs(part, RUN) for part in (words.symbols[:begin], words.symbols[n - end :])]
            )
        own = words.kept(begin, n - end)
        return Own(own, known, signature(rest), bool((rest != NUMBER).any()), len(rest) == n)

    def know(self, openings: tuple[tuple[int, int], ...], endings: tuple[tuple[int, int], ...]) -> None:
        """What earlier prompts began and ended with alike, from before a restart."""
        self.openings, self.endings = openings, endings

    def own(self, read: Read) -> NDArray[np.int32]:
        """The tokens of a prompt, which need be none of these, without what these began and ended with alike."""
        begin = _longest(self.openings, read.begin)
        n = len(read.words.symbols)
        return read.words.kept(begin, n - min(_longest(self.endings, read.end), n - begin))


def own_tokens(prompts: Iterable[ArrayLike], numbers: NDArray[np.bool_] | None = None) -> Iterator[NDArray[np.int32]]:
    """Of each prompt the tokens that it does not share with those around it, in order. The last ones are read before
    the first, too."""
    shared, known = SharedEnds(numbers), list(prompts)
    ahead = deque[Read]()
    for prompt in known[-LOOKED_BACK:]:
        shared.read(prompt)
    for prompt in known:
        ahead.append(shared.read(prompt))
        if len(ahead) > AHEAD:
            yield shared.split(ahead.popleft()).tokens
    for read in ahead:
        yield shared.split(read).tokens


def _common(number: int, group: Sequence[tuple[int, int]], many: float) -> int:
    """How many symbols the `number`th prompt has in common with so many others that it is no accident. group: of those
    that begin with the same RUN ones, their numbers and how many they have in common; `many` of them are enough."""
    common = 0
    after = [length for other, length in group if number < other <= number + AHEAD]
    before = [length for other, length in group if number - AHEAD <= other < number]
    lately = max((sorted(near)[-(AHEAD - 1)] for near in (before, after) if len(near) >= AHEAD - 1), default=0)
    lengths = sorted((length for _, length in group), reverse=True)
    while len(lengths) >= SHARED:
        most = lengths[math.ceil(MOST * len(lengths)) - 1]
        if most < STRETCH and len(lengths) < many:
            break
        common, n = most, len(lengths)
        many = SEVERAL * n
        lengths = [length for length in lengths if length >= common + RUN]
        if len(lengths) < many:
            lengths, many = [length for length in lengths if length >= common + LONG], SOME * n
    return lately if lately >= common + RUN else common


def _with_latest(known: tuple[tuple[int, int], ...], common: int, hashes: _Hashes) -> tuple[tuple[int, int], ...]:
    """What is known with what this prompt has in common with others, its first symbols."""
    latest = common, int(hashes.each[common - 1]) if common else 0
    if not common or (known and known[-1] == latest):
        return known
    return (*[each for each in known if each != latest][1 - MOST_ENDS :], latest)


def _longest(known: tuple[tuple[int, int], ...], hashes: _Hashes) -> int:
    """How many of its symbols are one of those."""
    each = hashes.each
    return max((length for length, hash in known if length <= len(each) and each[length - 1] == hash), default=0)


_NO_RUNS = np.zeros(0, np.uint64)
_NO_WORDS = Words(np.zeros(0, np.int32), np.zeros(0, np.int64), None)
