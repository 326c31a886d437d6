"""Guards of an adapter: a model that looks at what clients ask it, and at what it answers, by the adapter's policy.

    refuse   what is flagged is a 400 with the code content_policy_violation; so is what the guard gave no verdict of
    flag     it passes, with the header x-loradock-guard: prompt, answer, or both
    count    it passes, and an answer is looked at once the client has it

Where an answer can be refused or flagged, it is held back until it is whole, a stream too. A guard sees text alone.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext

from prometheus_client.core import CounterMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from starlette.datastructures import MutableHeaders
from starlette.types import Message, Send

from serve.asgi.exchange import Watch
from serve.auth.auth import Caller, Scope
from serve.engine.engine import LOW_PRIORITY
from serve.engine.payer import Cause, Payer
from serve.errors import BadRequest, EngineUnavailable, LoradockError, NotFound, TooLarge
from serve.gateway.moderation import Moderator
from serve.gateway.reading import Reading
from serve.rollout.policy import COUNT, REFUSE, Guard

log = logging.getLogger(__name__)

HEADER = "x-loradock-guard"
PROMPT, ANSWER = "prompt", "answer"
PASSED, FLAGGED, REFUSED, NO_VERDICT, SKIPPED = RESULTS = ("passed", "flagged", "refused", "error", "skipped")
# An answer that is held back has at most so many bytes.
MAX_HELD = 16 << 20
# Answers that are looked at at a time once their clients have them; further ones are counted as skipped.
AT_ONCE = 8
# Adapters with series of their own, about; the rest are counted as `other`.
MAX_SERIES = 1000 * len(RESULTS)
# The guard is the operators' choice: its name means what it means to tenant `default`.
_CALLER = Caller("guard", frozenset({Scope.INFERENCE, Scope.ADMIN}))


class Guards(Collector):
    """`guard_of(adapter)` is the guard by the policy of the adapter, or base, of this full name. For one event loop."""

    def __init__(self, moderator: Moderator, guard_of: Callable[[str], Guard]) -> None:
        self._moderator, self._guard_of = moderator, guard_of
        self._looking: set[asyncio.Task[None]] = set()
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, str, str]] = Counter()

    @asynccontextmanager
    async def over(
        self,
        adapter: str,
        payer: Payer,
        reading: Reading,
        watch: Watch,
        send: Send,
        wanted: Callable[[], AbstractAsyncContextManager[None]] = nullcontext,
        background: bool = False,
    ) -> AsyncIterator[Send]:
        """Where the answer to a request goes; BadRequest before the block, or at its end, for one that is refused.

        The guard's questions are the payer's, as the request is.

        `wanted()` ends what it is entered for once the client does not wait any more.
        """
        guard = self._guard_of(adapter)
        if guard.answer and guard.action == REFUSE and background:
            raise BadRequest(f"answers of {adapter} pass a guard: ask without background", param="background")
        flags = []
        if guard.prompt:
            async with wanted():
                flags += [PROMPT] if await self.check_prompt(adapter, payer, reading) else []
            watch.guard(self.gate(adapter, reading))
        if not guard.answer or guard.action == COUNT:
            yield _Held(send, flags).pass_on if flags else send
            if guard.answer:
                self._look_later(adapter, payer, reading.said(watch.read()))
            return
        held = _Held(send, flags)
        yield held.hold
        if not held.is_whole:
            return  # its client has left
        if held.status == 200:
            async with wanted():
                flags += [ANSWER] if await self.check_answer(adapter, payer, reading.said(watch.read())) else []
        await held.release()

    def watched(self, adapters: Sequence[str]) -> str | None:
        """Of the adapters that answer together, the one whose guard looks; None without a guard.

        BadRequest, if they have different ones.
        """
        guards = {adapter: guard for adapter in adapters if (guard := self._guard_of(adapter))}
        names = list(guards)
        if any(guards[name] != guards[names[0]] for name in names):
            both = " and ".join(names)
            raise BadRequest(f"{both} have different guards, so they do not answer together", param="model")
        return names[0] if names else None

    def gate(self, adapter: str, reading: Reading) -> Callable[[Sequence[int] | None], None] | None:
        """What refuses prompts that the guard has not seen, where it is to refuse."""
        guard = self._guard_of(adapter)
        return reading.gate if guard.prompt and guard.action == REFUSE else None

    async def check_prompt(self, adapter: str, payer: Payer, reading: Reading, *, priority: int = 0) -> bool:
        """The request is flagged, and passes nevertheless; BadRequest, if it is refused."""
        guard = self._guard_of(adapter)
        if not guard.prompt:
            return False
        refuses = guard.action == REFUSE
        try:
            text = await reading.text()
        except LoradockError as error:
            log.warning("a request to %s was not rendered for its guard: %s", adapter, error)
            if refuses:
                raise
            return False
        return await self._judged(adapter, payer, PROMPT, guard.prompt, text, priority)

    async def check_answer(self, adapter: str, payer: Payer, said: str, *, priority: int = 0) -> bool:
        """One of the answers is flagged, and they pass nevertheless; BadRequest, if they are refused."""
        guard = self._guard_of(adapter)
        return bool(guard.answer) and await self._judged(adapter, payer, ANSWER, guard.answer, said, priority)

    async def close(self) -> None:
        """Break off what is looked at."""
        for task in self._looking:
            task.cancel()
        await asyncio.gather(*self._looking, return_exceptions=True)

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(
            "loradock_guarded",
            "Prompts and answers that a guard looked at, by result: passed, flagged, refused, error or skipped.",
            labels=("adapter", "side", "result"),
        )
        with self._lock:
            counts = dict(self._counts)
        for labels, count in counts.items():
            family.add_metric(labels, count)
        yield family

    async def _judged(self, adapter: str, payer: Payer, side: str, guard: str, text: str | None, priority: int) -> bool:
        """It is flagged; `text` is None where it cannot be read."""
        if text == "":
            return False
        refuses = self._guard_of(adapter).action == REFUSE
        try:
            if text is None:
                raise self._unread(adapter)
            asking = payer.because(Cause.GUARD)
            salt = f"guard:{payer.tenant}"
            verdict = await self._moderator.judge(_CALLER, asking, text, guard, salt=salt, priority=priority)
        except LoradockError as error:
            log.warning("the guard %s gave no verdict on the %s of a request to %s: %s", guard, side, adapter, error)
            self._count(adapter, side, NO_VERDICT)
            if not refuses:
                return False
            if isinstance(error, NotFound):  # the client asked for what is there
                raise EngineUnavailable(
                    "this model's guard is not there: its operator knows which one it is"
                ) from error
            raise
        if not verdict.flagged:
            self._count(adapter, side, PASSED)
            return False
        self._count(adapter, side, REFUSED if refuses else FLAGGED)
        if refuses:
            names = ", ".join(sorted(verdict.categories))
            raise BadRequest(f"the {side} was refused by this model's guard: {names}", code="content_policy_violation")
        return True

    def _unread(self, adapter: str) -> BadRequest:
        return BadRequest(f"{adapter} has a guard, which reads text alone: send the prompt as text")

    def _look_later(self, adapter: str, payer: Payer, said: str) -> None:
        if len(self._looking) >= AT_ONCE:
            self._count(adapter, ANSWER, SKIPPED)
            return
        task = asyncio.create_task(self._look(adapter, payer, said))
        self._looking.add(task)
        task.add_done_callback(self._looking.discard)

    async def _look(self, adapter: str, payer: Payer, said: str) -> None:
        try:
            await self.check_answer(adapter, payer, said, priority=LOW_PRIORITY)
        except Exception:  # nobody waits for this task: its errors end here
            log.exception("an answer of %s was not looked at", adapter)

    def _count(self, adapter: str, side: str, result: str) -> None:
        with self._lock:
            if (adapter, side, result) not in self._counts:
                if len(self._counts) >= MAX_SERIES:
                    adapter = "other"
                # Prometheus does not see the growth of a counter that is born with its first event.
                self._counts.update({(adapter, side, each): 0 for each in RESULTS})
            self._counts[adapter, side, result] += 1


class _Held:
    """An answer on its way; `flags` are named in its header when it begins to go out."""

    def __init__(self, send: Send, flags: list[str]) -> None:
        self._send, self._flags = send, flags
        self._messages: list[Message] = []
        self._size = 0
        self.status = 0
        self.is_whole = False

    async def pass_on(self, message: Message) -> None:
        if message["type"] == "http.response.start" and self._flags:
            headers = MutableHeaders(raw=list(message["headers"]))
            headers[HEADER] = ", ".join(self._flags)
            message = {**message, "headers": headers.raw}
        await self._send(message)

    async def hold(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        else:
            self.is_whole = not message.get("more_body", False)
        self._size += len(message.get("body", b""))
        if self._size > MAX_HELD:
            raise TooLarge(f"the answer is above {MAX_HELD >> 20} MiB, the most that a guard looks at: ask for less")
        self._messages.append(message)

    async def release(self) -> None:
        for message in self._messages:
            await self.pass_on(message)
