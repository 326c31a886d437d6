"""What drift has counted of the tokens of each version's reference, for whoever asks which one a prompt fits.

counts.note(watched)               # the monitor's, once a reference is complete or was read
counts.of(id)                      # for any thread
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from serve.drift.features.features import PROMPT
from serve.drift.features.shared_ends import SharedEnds
from serve.drift.features.token_surprise import TokenSurprise
from serve.drift.watched_version import WatchedVersion
from serve.models.request_text import RequestText

# Versions whose counts are in memory for this, 100 KB each; the oldest make room.
MOST = 512


@dataclass(frozen=True, slots=True, eq=False)
class Counts:
    """What is counted of one version's reference; `text` is its base's tokenizer. `id` of a base is its name. `shared`
    knows what its prompts begin and end with alike, which is no part of the reference; the watcher's thread adds to it.
    """

    adapter: str
    id: str
    base: str
    surprise: TokenSurprise
    text: RequestText
    shared: SharedEnds


class ReferenceCounts:
    """`look(adapter, version, id)` notes what is kept of a version; whether it has a reference. `of`, `changes` and
    `is_missing` are for any thread, `find` for the watcher's, the rest is the monitor's, who holds its lock."""

    def __init__(self, look: Callable[[str, str, str], bool]) -> None:
        self._look = look
        self._counts: dict[str, Counts] = {}
        self._sought: set[str] = set()
        # Rises with each change.
        self.changes = 0

    def of(self, id: str) -> Counts | None:
        """What is counted of the version, as far as that is known."""
        return self._counts.get(id)

    def is_missing(self, id: str) -> bool:
        """Nothing is known of the version, and nobody has looked for it yet; who asks is to have it found."""
        if id in self._counts or id in self._sought:
            return False
        self._sought.add(id)
        return True

    def find(self, versions: Sequence[tuple[str, str, str]]) -> None:
        """Read the first of these versions, (adapter, version, id), of which there is a reference."""
        for version in versions:
            if self._look(*version):
                return

    def note(self, watched: WatchedVersion) -> bool:
        """Take what is counted of a version's reference, if it is complete."""
        signal, id = watched.baseline.signals[PROMPT], watched.id or watched.adapter
        surprise = signal.whole or signal.surprise  # references of earlier releases have the one alone
        if surprise is None or watched.text is None:
            return False
        known = self._counts.get(id)
        if known is None or known.surprise is not surprise:
            watched.text.special  # noqa: B018 - the tokenizer is read here, and not when a request waits
            shared = watched.thinning.shared
            new = Counts(watched.adapter, id, watched.base, surprise, watched.text, shared)
            counts = {**self._counts, id: new}
            while len(counts) > MOST:
                del counts[next(iter(counts))]
            self._replace(counts)
        return True

    def forget(self, id: str) -> None:
        """A version was removed."""
        if id in self._counts:
            self._replace({key: counts for key, counts in self._counts.items() if key != id})

    def drop(self, base: str) -> None:
        """Another model is behind this base."""
        self._sought.clear()
        self._replace({key: counts for key, counts in self._counts.items() if counts.base != base})

    def _replace(self, counts: dict[str, Counts]) -> None:
        self._counts = counts
        self.changes += 1
