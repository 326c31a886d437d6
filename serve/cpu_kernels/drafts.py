"""What a sequence is likely to say next, from what it has said and read, and whether to bet on it.

An answer that copies from its prompt, as extractions and edits do, goes on as the prompt went on after the same words.
`Continuations` finds the longest such run of tokens. `Bets` decides how many of the tokens after it are worth a place
in the next step: each right one saves a step, each one costs a part of a step, right or wrong. Nothing of another
sequence is drafted: how soon an answer comes tells nobody what others have asked.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

# The shortest run of tokens that is looked for, the longest that is compared, and how many places of one are.
LEAST = 3
LONGEST = 32
PLACES = 8
# Tokens of a sequence that are looked through; those after them are not.
KEPT = 1 << 16
# The most that is drafted of one sequence, and in one step.
MOST, MOST_IN_STEP = 7, 32
# What a sequence may lose by wrong drafts, in tokens: at first, for each token that it has said, and at a time.
CREDIT = 0.5
RATE = 0.01
CREDIT_KEPT = 2.0
# How many drafts of a version count as much as all those before them: traffic changes.
MEMORY = 500
# What is believed of a version's drafts before there are any, and what that counts for, in drafts: it is tried.
HOPE, HOPES = 0.8, 2
# What a version's drafts count for a sequence that has none of its own yet, in drafts.
BELIEF = 6
# Versions that are remembered.
VERSIONS = 1024
# Runs from so many tokens on are counted apart: what follows a longer one is surer.
RUNS = (6, 12)


class Continuations:
    """Where the runs of LEAST tokens of a sequence ended before."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._latest: dict[tuple[int, ...], int] = {}
        self._before: list[int] = [0] * LEAST  # by such a place: where the same run ended before that; 0: nowhere

    def extend(self, tokens: Sequence[int]) -> None:
        """Tokens that were read or said after the others."""
        known = self.tokens
        before = self._before
        latest = self._latest
        known.extend(tokens)
        for end in range(len(before), min(len(known), KEPT)):  # a place counts once the token there is known
            run = tuple(known[end - LEAST : end])
            before.append(latest.get(run, 0))
            latest[run] = end

    def longest(self) -> tuple[int, int]:
        """Where the longest run ended that ends the sequence too, the latest of equals, and its length; or (0, 0)."""
        known = self.tokens
        best = (0, 0)
        end = self._latest.get(tuple(known[-LEAST:]), 0)
        for _ in range(PLACES):
            if not end:
                break
            length = LEAST
            while length < min(LONGEST, end) and known[end - 1 - length] == known[-1 - length]:
                length += 1
            if length > best[1]:
                best = (end, length)
            end = self._before[end]
        return best

    def after(self, end: int, count: int) -> list[int]:
        """The tokens that followed there; a run that overlaps the sequence's end goes round."""
        period = len(self.tokens) - end
        return [self.tokens[end + i % period] for i in range(count)]


@dataclass(slots=True)
class Record:
    """How many drafts were looked at, up to the first wrong one of a step, and how many of them were right."""

    tried: float = 0.0
    right: float = 0.0

    def add(self, drafted: int, accepted: int) -> None:
        self.tried += accepted + (accepted < drafted)
        self.right += accepted

    def fade(self) -> None:
        self.tried *= 1 - 1 / MEMORY
        self.right *= 1 - 1 / MEMORY


@dataclass(slots=True)
class Bettor:
    """One sequence: what it may still lose, and its drafts so far."""

    version: str
    continuations: Continuations = field(default_factory=Continuations)
    credit: float = CREDIT
    record: Record = field(default_factory=Record)
    # Of the drafts in this step: after a run of which kind, and what each cost.
    kind: int = 0
    price: float = 0.0

    def said(self, tokens: Sequence[int]) -> None:
        self.continuations.extend(tokens)
        self.credit = min(CREDIT_KEPT, self.credit + RATE * len(tokens))


class Bets:
    """Which sequences draft how much, by what was right of their drafts and of their version's."""

    def __init__(self) -> None:
        self._versions: OrderedDict[str, list[Record]] = OrderedDict()

    def draft(self, sequence: Bettor, price: float, most: int) -> list[int]:
        """Tokens for the next step, where each costs `price` tokens."""
        end, length = sequence.continuations.longest()
        most = min(most, MOST, int(sequence.credit / price))
        if not length or most < 1:
            return []
        sequence.kind, sequence.price = sum(length >= least for least in RUNS), price
        record = self._version(sequence.version)[sequence.kind]
        count = _worth(self._right(sequence, record), price, most)
        if not count:
            record.fade()  # what is not tried is forgotten, little by little
        return sequence.continuations.after(end, count)

    def settle(self, sequence: Bettor, drafted: int, accepted: int) -> None:
        """The step is over."""
        record = self._version(sequence.version)[sequence.kind]
        record.fade()
        record.add(drafted, accepted)
        sequence.record.add(drafted, accepted)
        sequence.credit = min(CREDIT_KEPT, sequence.credit + accepted - drafted * sequence.price)

    def _right(self, sequence: Bettor, record: Record) -> float:
        """How likely a draft is right, if those before it are."""
        of_version = (record.right + HOPE * HOPES) / (record.tried + HOPES)
        own = sequence.record
        return (own.right + BELIEF * of_version) / (own.tried + BELIEF)

    def _version(self, name: str) -> list[Record]:
        records = self._versions.setdefault(name, [Record() for _ in range(len(RUNS) + 1)])
        self._versions.move_to_end(name)
        if len(self._versions) > VERSIONS:
            self._versions.popitem(last=False)
        return records


def _worth(right: float, price: float, most: int) -> int:
    """How many drafts make the most tokens for their time, where each is `right` if those before it are."""
    count = 0
    tokens = 1.0
    time = 1.0
    reached = right
    while count < most and reached * time > price * tokens:
        count = count + 1
        tokens = tokens + reached
        time = time + price
        reached = reached * right
    return count


class DraftPrice:
    """What a further token of an answer costs a step: seconds by tokens, least squares, the past fading."""

    # A token more for a step of one, in such steps, and what that counts for before anything is measured (in tokens^2).
    FIRST, WEIGHT = 0.1, 64.0
    FADE = 0.99

    def __init__(self) -> None:
        self._weight = self._rows = self._seconds = self._squares = self._products = 0.0

    def took(self, rows: int, seconds: float) -> None:
        """A step without prompts had so many tokens."""
        self._weight = self._weight * self.FADE + 1
        self._rows = self._rows * self.FADE + rows
        self._seconds = self._seconds * self.FADE + seconds
        self._squares = self._squares * self.FADE + rows * rows
        self._products = self._products * self.FADE + rows * seconds

    def price(self, answers: int) -> float:
        """Tokens that all answers of a step together lose by one draft in it."""
        return answers * self._ratio() / (1 + self._ratio() * (answers - 1))

    def _ratio(self) -> float:
        """Of a token more to a step of one token."""
        if not self._weight:
            return self.FIRST
        rows, seconds = self._rows / self._weight, self._seconds / self._weight
        usual = self.FIRST * seconds / (1 + self.FIRST * (rows - 1))
        spread = self._squares - self._rows * rows
        slope = (self._products - self._rows * seconds + self.WEIGHT * usual) / (spread + self.WEIGHT)
        single = seconds - slope * (rows - 1)
        return min(1.0, max(0.02, slope / single)) if single > 0 else 1.0
