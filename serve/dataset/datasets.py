"""Builds what an adapter is trained on out of its tenant's own captured requests, one build at a time."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.adapters.byte_ledger import ByteLedger, Kind, Room
from serve.adapters.fair_threads import FairThreads, in_the_name_of
from serve.adapters.registry.registry import Registry
from serve.dataset.adapter_traffic import AdapterTraffic, Span
from serve.dataset.asked_text import Asked, NoText, asked_text
from serve.dataset.build import Built, Options, Progress, build
from serve.dataset.examples import lines_of
from serve.dataset.held_out import HeldOut
from serve.errors import BadRequest, Conflict, NotFound
from serve.names import DEFAULT, shown, tenant_of
from serve.rollout.golden.golden_results import GoldenResults
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
    """`days` is for how long a later build trains on nothing that this one held out."""

    def __init__(
        self,
        folder: Path,
        traffic: AdapterTraffic,
        ledger: ByteLedger,
        policies: Policies,
        golden: GoldenResults,
        registry: Registry,
        days: float = 30.0,
    ) -> None:
        self._folder = folder
        self.traffic = traffic
        self._ledger = ledger
        self._policies = policies
        self._golden = golden
        self._held_out = HeldOut(registry, days)
        # Of one tenant one at a time: a build does not keep what a deletion has just taken away.
        self._threads = FairThreads(2, "datasets")
        # What is being built, by adapter: what is done now, how much of it, and of how much.
        self._under_way: dict[str, tuple[str, int, int]] = {}
        # What clients asked for, and of which tenant.
        self._asking: set[tuple[str, str]] = set()

    def start(self) -> None:
        """Drop what a kill left, and take over what an earlier release did. Blocks."""
        shutil.rmtree(self._folder / "building", ignore_errors=True)
        self._held_out.adopt(self._folder / "held_out")

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

    async def apply_deletions(self) -> None:
        """Delete what was deleted through other servers."""
        await self._in_turn(DEFAULT, self._apply_deletions)

    def _apply_deletions(self) -> None:
        for conversation in {captured.conversation for captured in self.traffic.apply_deletions()}:
            self._held_out.forget(conversation)

    def _build(self, options: Options, folder: Path, room: Room, bases: bool, progress: Progress) -> Built:
        self._apply_deletions()
        names = self.traffic.names(options.adapter)
        models = self.traffic.with_base(options.adapter) if bases else names
        span, now = Span(options.tenant, models, options.since, options.until), time.time()

        def heard(doing: str, done: int, of: int) -> None:
            self._under_way[options.adapter] = (doing, done, of)
            progress(doing, done, of)

        held_out = [entry for name in names for entry in self._held_out.entries(name, now)]
        try:
            built = build(
                self.traffic.within(span),
                folder,
                options,
                golden=_questions(self._golden.golden(options.adapter)),
                before=held_out,
                left_out=self.traffic.left_out(span),
                progress=heard,
                take=room.take,
            )
        finally:
            self._under_way.pop(options.adapter, None)
        self._held_out.add(options.adapter, built.kept_apart, now)
        return built

    def _forget(self, adapter: str, key: str, id: str) -> Forgotten:
        try:
            conversation, gone = self.traffic.forget(adapter, key, id)
        except NotFound:
            self._held_out.forget(id)  # which keeps it for longer
            raise
        self._held_out.forget(conversation)
        return Forgotten(conversation, len(gone), [line for captured in gone for line in lines_of(captured)])

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
