"""The folders of mixtures that were asked for: made in a moment from the parts' files, and forgotten when not used.

root/mixtures/<digest>/     as a version's blob; none outlives the server
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from serve.adapters.file_thread import in_turn
from serve.adapters.mixing.mixture import Mixture
from serve.adapters.mixing.stacking import stack
from serve.adapters.store import Store
from serve.errors import EngineUnavailable, NotFound

# So many stay on the disk at a time, and those that an engine holds.
MOST = 64


class MixtureFolders:
    """`held(id)` says that an engine has an adapter loaded, and may read its files again."""

    def __init__(self, store: Store, held: Callable[[str], bool]) -> None:
        self._store = store
        self._held = held
        self._root = store.root / "mixtures"
        shutil.rmtree(self._root, ignore_errors=True)
        # The engine's name of each, by digest, the latest used last.
        self._there: OrderedDict[str, str] = OrderedDict()
        self._coming: dict[str, asyncio.Task[None]] = {}

    def has(self, mixture: Mixture) -> bool:
        """Its folder is there, and stays for a while."""
        if mixture.digest not in self._there:
            return False
        self._there.move_to_end(mixture.digest)
        return True

    def path(self, mixture: Mixture) -> Path:
        """Where its files are, or would be."""
        return self._root / mixture.digest

    async def bring(self, mixture: Mixture) -> None:
        """Make its folder, if it is not there; whoever asks meanwhile waits for the same one."""
        if self.has(mixture):
            return
        if mixture.digest not in self._coming:
            task = self._coming[mixture.digest] = asyncio.create_task(self._make(mixture))
            task.add_done_callback(lambda task: self._made(mixture, task))
        await asyncio.shield(self._coming[mixture.digest])

    def _made(self, mixture: Mixture, task: asyncio.Task[None]) -> None:
        self._coming.pop(mixture.digest, None)
        if not task.cancelled():
            task.exception()  # whoever still waits has it

    async def _make(self, mixture: Mixture) -> None:
        parts = []
        for part in mixture.parts:
            try:
                parts.append((await self._store.bring(part.adapter.digest), part.weight))
            except NotFound as lost:
                raise EngineUnavailable(
                    f"{part.adapter.tag} is registered and {lost}: an operator must see to it"
                ) from lost
        doomed = [self._root / digest for digest in self._surplus()]
        await in_turn(self._stack, parts, self.path(mixture), doomed)
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
