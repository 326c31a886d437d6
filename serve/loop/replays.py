"""What a candidate says to requests that it was not trained on, beside what the live version says; no client sees it.

Both answer captured requests of the conversations that were held out, greedily and in the gaps of traffic. It decides
nothing: it is for whoever says yes or no. Texts are not kept.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from serve.adapters.adapter import Adapter
from serve.dataset.conversations import Captured
from serve.dataset.replay import chosen, replay, report
from serve.engine.payer import Cause, Payer
from serve.loop.loop_rows import LoopRows
from serve.loop.objects import Loop
from serve.rollout.golden.golden import Golden

# Captured requests that are looked at, and of those that were held out so many that are answered; tokens of an answer.
LOOKED_AT = 10_000
ANSWERED = 20
MAX_TOKENS = 128


class Replays:
    """`captured(name)` is what an adapter was asked here, the latest first; it blocks."""

    def __init__(self, rows: LoopRows, captured: Callable[[str], Iterator[Captured]], golden: Golden) -> None:
        self._rows = rows
        self._captured = captured
        self._golden = golden

    async def compared(
        self, loop: Loop, live: Adapter, candidate: Adapter, goes_on: Callable[[], bool]
    ) -> dict[str, Any] | None:
        """Numbers of both versions' answers with a sentence (`text`); None where no such request is kept here."""
        requests = await asyncio.to_thread(self._requests, loop)
        if not requests:
            return None
        golden = await asyncio.to_thread(self._golden.results.golden, loop.name)

        async def more() -> bool:
            return goes_on()

        replayed, refused = await replay(
            self._golden.runner,
            candidate,
            requests,
            against=live,
            max_tokens=MAX_TOKENS,
            judge=golden.shadow.judge if golden and golden.shadow else None,
            payer=Payer(candidate.tenant, Cause.LOOP, None),
            goes_on=more,
        )
        numbers = await asyncio.to_thread(report, replayed, refused, 0)
        shown = {name: numbers[name] for name in ("requests", "agreement", "refusals", "judge", "ratings")}
        return {**shown, "text": _sentence(numbers)} if replayed else None

    def _requests(self, loop: Loop) -> list[Captured]:
        held_out = {example.conversation for example in self._rows.references.examples(loop.state.held_out)}
        rows = islice(self._captured(loop.name), LOOKED_AT)
        return chosen((row for row in rows if row.conversation in held_out), ANSWERED)


def _sentence(numbers: dict[str, Any]) -> str:
    alike = numbers["agreement"]["exact"]
    refusals = numbers["refusals"]
    ratings = numbers["ratings"]
    text = (
        f"{numbers['requests']} held-out requests: {alike:.0%} of the answers are the live version's word for word; "
        f"{refusals['candidate']:.0%} are refusals, and {refusals['other']:.0%} of the live version's"
    )
    if ratings["rated"]:
        text += f"; rated {ratings['low']:.2f} to {ratings['high']:.2f}, and {ratings['given']:.2f} what was answered"
    return text
