"""Builds what an adapter is trained on out of its tenant's own captured requests, one build at a time."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.adapters.byte_ledger import ByteLedger, Kind, Room
from serve.adapters.fair_threads import FairThreads, in_the_name_of
from serve.adapters.registry.registry import Registry
from serve.dataset.asked_text import Asked, NoText, asked_text
from serve.dataset.build import Built, Options, Progress, build
from serve.dataset.conversations import Captured, Conversations
from serve.dataset.examples import lines_of
from serve.dataset.held_out import HeldOut
from serve.errors import BadRequest, Conflict, NotFound
from serve.names import shown, tenant_of
from serve.rollout.golden.golden_set import GoldenSet
from serve.rollout.policy import Policies

# Examples of one build; a job takes no more than its file may have.
MOST = 100_000


def _silent(doing: str, done: int, of: int) -> None:
    """Nobody wants to know how far it is."""


@dataclass(frozen=True, slots=True)
class Forgotten:
    """A conversation that was deleted. `lines` are those to learn that earlier builds may have made of it."""

    conversation: str
    requests: int
    lines: list[dict[str, Any]]


class Datasets:
    """`base_of` is the name of the base that an adapter runs on, `golden_of` its golden set, if it has one; `days` is
    for how long a later build trains on nothing that this one held out. `forgotten(tenant, ids)` hears in a thread of
    requests that were deleted; `settle()` returns once what was answered so far is kept."""

    def __init__(
        self,
        folder: Path,
        conversations: Conversations,
        registry: Registry,
        ledger: ByteLedger,
        *,
        policies: Policies,
        base_of: Callable[[str], str],
        golden_of: Callable[[str], GoldenSet | None],
        forgotten: Callable[[str, Collection[str]], None],
        settle: Callable[[], None],
        days: float = 30.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._folder = folder
        self._conversations = conversations
        self._registry = registry
        self._policies = policies
        self._base_of = base_of
        self._golden_of = golden_of
        self._clock = clock
        self._forgotten = forgotten
        self._settle = settle
        self._ledger = ledger
        self._held_out = HeldOut(folder / "held_out", days)
        # Of one tenant one at a time: a build does not keep what a deletion has just taken away.
        self._threads = FairThreads(2, "datasets")
        # What is being built, by adapter: what is done now, how much of it, and of how much.
        self._under_way: dict[str, tuple[str, int, int]] = {}
        # What clients asked for, and of which tenant.
        self._asking: set[tuple[str, str]] = set()

    def start(self) -> None:
        """Drop what a kill left. Blocks."""
        shutil.rmtree(self._folder / "building", ignore_errors=True)

    async def build(
        self, options: Options, folder: Path, room: Room, *, bases: bool = False, progress: Progress = _silent
    ) -> Built:
        """Write the files into `folder`, as far as the `room` has place for them. `bases`: what the tenant asked the
        adapter's base counts too.

        Conflict, if the adapter's policy does not let it learn; BadRequest for options that cannot be.
        """
        check(options)
        self.must_learn(options.adapter)
        return await self._in_turn(options.tenant, self._build, options, folder, room, bases, progress)

    @contextmanager
    def alone(self, what: str, tenant: str) -> Iterator[None]:
        """The tenant's only build or replay that a client asked for; Conflict if there is another one.

        A build takes turns with the tenant's deletions; a replay holds its requests in memory.
        """
        if (what, tenant) in self._asking:
            raise Conflict(f"another {what} of this tenant's is under way or has to wait: ask again when it has ended")
        self._asking.add((what, tenant))
        try:
            yield
        finally:
            self._asking.discard((what, tenant))

    def progress(self, adapter: str) -> tuple[str, int, int] | None:
        """What the adapter's build does now, how much of it is done, and of how much (0: not known); None for none."""
        return self._under_way.get(adapter)

    def learns(self, adapter: str) -> bool:
        """Whether requests to it are kept for this."""
        return self._policies[adapter].train_on_traffic

    def must_learn(self, adapter: str) -> None:
        """Conflict, if the adapter's policy does not let it learn."""
        if not self.learns(adapter):
            raise Conflict(
                f"{adapter} does not learn from its traffic: an operator allows it with "
                f'`policies: {{"{adapter}": {{train_on_traffic: true}}}}` in the configuration, and requests '
                "are kept from then on",
                param="name",
            )

    @asynccontextmanager
    async def folder(self, tenant: str) -> AsyncIterator[tuple[Path, Room]]:
        """A private folder, which is gone at the end, and room for what is built in it."""
        place = await asyncio.to_thread(self._new_folder)
        with self._ledger.room(tenant, Kind.DATASETS) as room:
            try:
                yield place, room
            finally:
                await asyncio.to_thread(shutil.rmtree, place, ignore_errors=True)

    async def forget(self, adapter: str, key: str, id: str) -> Forgotten:
        """Delete a conversation, by its id or that of one of its answers, as whoever has this API key means it;
        NotFound."""
        return await self._in_turn(tenant_of(adapter), self._forget, adapter, key, id)

    def listed(self, adapter: str, limit: int) -> list[dict[str, Any]]:
        """The adapter's latest conversations, without their texts. Blocks."""
        return self._conversations.listed(tenant_of(adapter), self._names(adapter), limit)

    def rows(self, adapter: str) -> Iterator[Captured]:
        """What the adapter's tenant asked it, the latest first. Blocks."""
        return self._conversations.rows(tenant_of(adapter), self._names(adapter))

    def _build(self, options: Options, folder: Path, room: Room, bases: bool, progress: Progress) -> Built:
        names = self._names(options.adapter)
        asked = [*names, *([self._base_of(options.adapter)] if bases else [])]
        span = (options.tenant, asked, options.since, options.until)
        now = self._clock()

        def heard(doing: str, done: int, of: int) -> None:
            self._under_way[options.adapter] = (doing, done, of)
            progress(doing, done, of)

        before = [entry for name in names for entry in self._held_out.entries(name, now)]
        try:
            built = build(
                self._conversations.rows(*span),
                folder,
                options,
                golden=_questions(self._golden_of(options.adapter)),
                before=before,
                left_out=self._conversations.left_out(*span),
                progress=heard,
                take=room.take,
            )
        finally:
            self._under_way.pop(options.adapter, None)
        self._held_out.add(options.adapter, built.kept_apart, now)
        return built

    def _forget(self, adapter: str, key: str, id: str) -> Forgotten:
        names = self._names(adapter)
        asked = [*names, self._base_of(adapter)]
        self._settle()  # a turn that waits to be kept goes with the others
        try:
            conversation, gone = self._conversations.forget(tenant_of(adapter), key, asked, id)
        except NotFound:
            self._held_out.forget(id)  # which keeps it for longer
            raise
        self._held_out.forget(conversation)
        self._forgotten(tenant_of(adapter), [captured.id for captured in gone])
        return Forgotten(conversation, len(gone), [line for captured in gone for line in lines_of(captured)])

    def _names(self, adapter: str) -> list[str]:
        return [adapter, *self._registry.former_names(adapter)]

    def _new_folder(self) -> Path:
        (self._folder / "building").mkdir(mode=0o700, parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(dir=self._folder / "building"))

    async def _in_turn(self, tenant: str, call: Callable[..., Any], *args: Any) -> Any:
        with in_the_name_of(tenant):
            future = asyncio.get_running_loop().run_in_executor(self._threads, call, *args)
        return await future


def check(options: Options) -> None:
    """BadRequest for options that cannot be."""
    if tenant_of(options.adapter) != options.tenant:
        raise BadRequest(f"{options.adapter} is not {options.tenant}'s: a tenant's requests train its own adapters")
    for name, value, low, high in (
        ("held_out", options.held_out, 0.0, 0.5),
        ("balance", options.balance, 1.0, 1e6),
        ("max_examples", options.max_examples, 1, MOST),
    ):
        if not low <= value <= high:
            raise BadRequest(f"{name} takes {low:g} to {high:g}, not {shown(value, 40)}", param=name)
    if options.until is not None and options.until <= options.since:
        raise BadRequest("until is not after since: nothing was asked in between", param="until")


def _questions(golden: GoldenSet | None) -> Sequence[Asked]:
    """What the cases ask, as far as it is text."""
    asked = [asked_text(case.request) for case in golden.cases] if golden else []
    return [question for question in asked if not isinstance(question, NoText)]
