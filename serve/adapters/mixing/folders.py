"""Where an adapter's files are: a version's in the store, a mixture's made in a moment of its parts' and forgotten when
not used.

root/mixtures/<digest>/     as a version's blob; none outlives the server
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from serve.adapters.adapter import Adapter
from serve.adapters.file_thread import in_turn
from serve.adapters.mixing.mixture import Mixture
from serve.adapters.mixing.stacking import stack
from serve.adapters.store import Store
from serve.errors import EngineUnavailable, NotFound

# So many stay on the disk at a time, and those that an engine holds.
MOST = 64


class Holder(Protocol):
    """An engine, as far as it is asked here."""

    def holds(self, adapter_id: str) -> bool: ...


class AdapterFolders:
    """`held(id)` says that an engine has a mixture loaded, and may read its files again."""

    def __init__(self, store: Store, held: Callable[[str], bool]) -> None:
        self._store = store
        self._held = held
        self._root = store.root / "mixtures"
        shutil.rmtree(self._root, ignore_errors=True)
        # The engine's name of each mixture, by digest, the latest used last.
        self._there: OrderedDict[str, str] = OrderedDict()
        self._coming: dict[str, asyncio.Task[None]] = {}

    def has(self, adapter: Adapter) -> bool:
        """Its files are on this machine, and stay for a while."""
        if not adapter.is_mixed:
            return self._store.has(adapter.digest)
        if adapter.digest not in self._there:
            return False
        self._there.move_to_end(adapter.digest)
        return True

    def path(self, adapter: Adapter, engine: Holder) -> Path:
        """Where they are; what the engine holds answers also while they are out of reach."""
        if adapter.is_mixed:
            return self._root / adapter.digest
        return self._store.place(adapter.digest) if engine.holds(adapter.id) else self._store.path(adapter.digest)

    async def bring(self, adapter: Adapter) -> None:
        """Get them onto this machine; whoever asks for a mixture meanwhile waits for the same one."""
        if not isinstance(adapter, Mixture):
            await self._fetched(adapter)
            return
        if self.has(adapter):
            return
        if adapter.digest not in self._coming:
            task = self._coming[adapter.digest] = asyncio.create_task(self._make(adapter))
            task.add_done_callback(lambda task: self._made(adapter, task))
        await asyncio.shield(self._coming[adapter.digest])

    async def _fetched(self, adapter: Adapter) -> Path:
        try:
            return await self._store.bring(adapter.digest)
        except NotFound as lost:
            raise EngineUnavailable(f"{adapter.tag} is registered and {lost}: an operator must see to it") from lost

    def _made(self, mixture: Mixture, task: asyncio.Task[None]) -> None:
        self._coming.pop(mixture.digest, None)
        if not task.cancelled():
            task.exception()  # whoever still waits has it

    async def _make(self, mixture: Mixture) -> None:
        parts = [(await self._fetched(part.adapter), part.weight) for part in mixture.parts]
        doomed = [self._root / digest for digest in self._surplus()]
        await in_turn(self._stack, parts, self._root / mixture.digest, doomed)
        self._there[mixture.digest] = mixture.id

    def _surplus(self) -> list[str]:
        """Forget those used longest ago that no engine holds."""
        idle = [digest for digest, id in self._there.items() if not self._held(id)]
        surplus = idle[: max(0, len(self._there) - MOST + 1)]
        for digest in surplus:
            del self._there[digest]
        return surplus

    def _stack(self, parts: list[tuple[Path, float]], target: Path, doomed: list[Path]) -> None:
        for folder in doomed:
            shutil.rmtree(folder, ignore_errors=True)
        self._root.mkdir(mode=0o700, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=self._root))
        try:
            stack(parts, aside)
            aside.rename(target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
