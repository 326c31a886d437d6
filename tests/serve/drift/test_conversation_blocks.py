"""The messages that go on with one conversation are compared together, once in a span of requests."""

from __future__ import annotations

import numpy as np

from serve.drift.conversation_blocks import SPAN, TURNS, ConversationBlocks
from serve.drift.features.last_turn import Turn


def turn(position, said, before=b"", length=20, repeats=False):
    return Turn(np.arange(length), position, repeats, said, before)


def offered(blocks, turns):
    """All blocks of these (item, turn, asker)."""
    return [block for request in turns for block in blocks.offer(*request)]


def other(count, start=1000):
    """First messages of other conversations."""
    return [(None, turn(0, b"o%d" % i), start + i) for i in range(count)]


def test_what_one_conversation_says_within_a_span_is_one_block():
    blocks: ConversationBlocks = ConversationBlocks()
    conversation = [("a", turn(0, b"a"), 1), ("b", turn(1, b"b", b"a"), 1), ("c", turn(2, b"c", b"b"), 1)]
    assert offered(blocks, [*conversation, *other(SPAN - 2)]) == []
    assert offered(blocks, other(1)) == [["b", "c"]] and blocks.counts["accepted"] == 2


def test_a_conversation_has_one_block_in_a_span():
    blocks: ConversationBlocks = ConversationBlocks()
    many = [(i, turn(i, b"%d" % i, b"%d" % (i - 1)), 1) for i in range(20)]
    assert offered(blocks, many) == [[1, 2, 3, 4]]
    assert blocks.counts == {"accepted": TURNS, "repeated": 0, "same_conversation": 15, "asked_already": 0}
    assert offered(blocks, other(SPAN)) == []
    assert offered(blocks, [(20, turn(20, b"20", b"19"), 1), *other(SPAN)]) == [[20]]


def test_each_message_is_known_at_once_with_what_was_said_before_it():
    blocks: ConversationBlocks = ConversationBlocks()
    joined = []
    for item, before in (("a", b""), ("b", b"a"), ("c", b"b"), ("d", b"c"), ("e", b"d"), ("f", b"e")):
        blocks.offer(item, turn(ord(item) - ord("a"), item.encode(), before), 1)
        joined.append("".join(blocks.joined))
    assert joined == ["", "ab", "abc", "abcd", "abcde", ""], "a block of four follow-ups is full"
    offered(blocks, other(SPAN + 1))
    blocks.offer("g", turn(6, b"g", b"f"), 1)
    assert blocks.joined == ["g"], "what was said long ago is forgotten"


def test_conversations_at_the_same_time_have_blocks_of_their_own():
    blocks: ConversationBlocks = ConversationBlocks()
    turns = [((asker, i), turn(i, b"%d %d" % (asker, i)), asker) for i in range(3) for asker in range(5)]
    assert offered(blocks, [*turns, *other(SPAN)]) == [[(asker, 1), (asker, 2)] for asker in range(5)]


def test_a_client_that_cuts_the_history_off_is_known_by_what_was_said_before():
    """Its first message is another one each time, and so is its asker."""
    blocks: ConversationBlocks = ConversationBlocks()
    windowed = [(i, turn(1, b"%d" % i, b"%d" % (i - 1)), 500 + i) for i in range(1, 4)]
    assert offered(blocks, [*windowed, *other(SPAN)]) == [[1, 2, 3]]


def test_what_was_said_long_ago_in_another_conversation_does_not_tear_this_one_apart():
    """Whoever cuts the history off is known by what others may have said too."""
    blocks: ConversationBlocks = ConversationBlocks()
    long_over = [(None, turn(1, b"%d" % i, b"long ago"), i) for i in range(4)]
    assert len(offered(blocks, [*long_over, *other(2 * SPAN)])) == 4
    windowed = [(i, turn(1, b"%d" % i, b"%d" % (i - 1)), i - 1) for i in range(1, 4)]
    assert offered(blocks, [*windowed, *other(SPAN)]) == [[1, 2, 3]]


def test_an_agents_steps_and_repeated_messages_are_left_out_and_counted():
    blocks: ConversationBlocks = ConversationBlocks()
    again = [(i, turn(1, b"again"), i) for i in range(4)]
    step = ("step", turn(1, b"x", repeats=True), 9)
    short = [(i, turn(1, b"yes", length=2), 20 + i) for i in range(3)]
    taken = offered(blocks, [*again, step, *short, *other(SPAN)])
    assert taken == [[0], [0], [1], [2]], "whoever says yes says it on his own"
    assert blocks.counts == {"accepted": 4, "repeated": 3, "same_conversation": 0, "asked_already": 1}


def test_counts_go_on_after_a_restart():
    blocks: ConversationBlocks = ConversationBlocks()
    offered(blocks, [("a", turn(1, b"a"), 1)])
    again: ConversationBlocks = ConversationBlocks()
    again.restore(blocks.state())
    assert again.counts == blocks.counts
    again.restore({})
    assert again.counts == blocks.counts
