"""Follow-ups of one conversation belong together: what is compared is a block of them, not each by itself.

    blocks = ConversationBlocks()
    for turns in blocks.offer(item, turn, asker):      # those blocks that are complete now
    blocks.joined                                      # its conversation's first message, and its block so far

The turns of a conversation tell of one another, and the detector takes what it gets for independent. So the follow-ups
of a conversation that come within SPAN requests, of any conversation, are one unit, TURNS of them at most; a
conversation has one unit in SPAN requests. Which conversation a request goes on with is known by its asker or by the
message of the user's before its last one: clients that cut the history off have another first message each time.

Memory is bounded, and depends on a fixed span of the stream. Blocks that are not complete are lost at a restart.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from serve.drift.features.last_turn import Turn
from serve.drift.thinning import ACCEPTED, CROWDED, REPEATED

Item = TypeVar("Item")

# Requests within which turns of one conversation are one block, and how many of them are.
SPAN, TURNS = 64, 4
# An agent sends what was asked once again with each result of a tool.
ALREADY = "asked_already"
COUNTS = (ACCEPTED, REPEATED, CROWDED, ALREADY)


@dataclass(slots=True)
class _Block(Generic[Item]):
    """began: the number of the request that opened it; over: it is complete."""

    began: int
    items: list[Item] = field(default_factory=list)
    over: bool = False


class ConversationBlocks(Generic[Item]):
    """`offer` takes every request of a version, in order; first turns only help to know conversations again."""

    def __init__(self, span: int = SPAN, turns: int = TURNS) -> None:
        self._span, self._turns = span, turns
        self._requests = 0
        # By conversation, in the order in which they began.
        self._blocks: OrderedDict[bytes, _Block[Item]] = OrderedDict()
        self._conversations: OrderedDict[bytes, bytes] = OrderedDict()
        # The follow-ups of the last `span` requests, and when they came.
        self._said: OrderedDict[bytes, int] = OrderedDict()
        self.counts = dict.fromkeys(COUNTS, 0)
        # What the block has so far that the last request is in, itself the last, behind the first message of its
        # conversation if that is not long ago; nothing where it is in none.
        self.joined: list[Item] = []
        # First messages of the conversations that began last.
        self._begun: OrderedDict[bytes, Item] = OrderedDict()

    def offer(self, item: Item, turn: Turn, asker: int | None) -> list[list[Item]]:
        """Take in a request; the blocks that are complete with it, each with its turns in order."""
        self._requests += 1
        complete, self.joined = self._over(), []
        conversation = self._conversation(turn, asker)
        if not turn.follows:
            self._begun[conversation] = item
            if len(self._begun) > self._span:
                self._begun.popitem(last=False)
            return complete
        reason = self._reason(turn, conversation)
        self.counts[reason] += 1
        if reason == ACCEPTED:
            block = self._blocks.setdefault(conversation, _Block(self._requests))
            block.items.append(item)
            begun = self._begun.get(conversation)
            self.joined = block.items if begun is None else [begun, *block.items]
            if len(block.items) == self._turns:
                block.over = True
                complete.append(block.items)
        return complete

    def _reason(self, turn: Turn, conversation: bytes) -> str:
        if turn.repeats:
            return ALREADY
        if len(turn.tokens) >= self._turns * 2:  # a shorter one is said by many: "yes, please"
            repeated = self._said.pop(turn.said, None) is not None
            self._said[turn.said] = self._requests
            if repeated:
                return REPEATED
        block = self._blocks.get(conversation)
        return CROWDED if block is not None and block.over else ACCEPTED

    def _over(self) -> list[list[Item]]:
        """Blocks whose span is over, but for those that were complete before."""
        oldest = self._requests - self._span
        while self._said and next(iter(self._said.values())) < oldest:
            self._said.popitem(last=False)
        complete = []
        while self._blocks and next(iter(self._blocks.values())).began <= oldest:
            _, block = self._blocks.popitem(last=False)
            if not block.over:
                complete.append(block.items)
        return complete

    def _conversation(self, turn: Turn, asker: int | None) -> bytes:
        """What stays the same over a conversation. An asker that came before is sure; that others said the same
        message before is not."""
        named = b"asker " + asker.to_bytes(8, "big") if asker is not None else b""
        names = [name for name in (named, turn.before) if name]
        known = (self._conversations[name] for name in names if name in self._conversations)
        conversation = next(known, names[0] if names else turn.said)
        for name in filter(None, (named, turn.said)):
            self._conversations[name] = conversation
            self._conversations.move_to_end(name)
        # Of some span of requests, two of each: if it were longer, ever more would seem to go on with one long over.
        while len(self._conversations) > 2 * self._span:
            self._conversations.popitem(last=False)
        return conversation

    def state(self) -> dict[str, NDArray]:
        """What was counted, as arrays; not the blocks."""
        return {"counts": np.array([self.counts[name] for name in COUNTS])}

    def restore(self, state: Mapping[str, NDArray]) -> None:
        """Go on counting; earlier releases did not."""
        if "counts" in state:
            self.counts = dict(zip(COUNTS, state["counts"].tolist(), strict=True))
