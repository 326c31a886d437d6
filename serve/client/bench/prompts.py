"""Prompts of about a wanted length that share no beginning.

A prefix cache would answer a repeated prompt for nothing, and a harness that repeats its prompts measures that cache.
Each prompt therefore opens with words that no other prompt of this run, nor of any run before it, opens with.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from hashlib import blake2b
from random import Random

_TEXT = """
able about above across after again air all almost along also always among animal another answer any apple around art
ask autumn away baby back bad bag ball bank base basket beach bear beautiful because bed before begin behind bell below
best better between big bird black blue board boat body book both bottle bottom box boy bread break bridge bright bring
brother brown build bus business but buy cake call camera car card care carry cat catch cause center chair change check
child church circle city class clean clear climb clock close cloud coat coffee cold color come company cook cool copper
corner cotton country course cover cow create cross cup cut dance dark day deep desk dinner doctor dog door down draw
dream dress drink drive dry dust each ear early earth east easy eat edge egg eight empty end engine enough evening event
ever every example eye face fact fall family famous farm fast father feel few field fight fill film final find fine
finger fire first fish five flat floor flower fly follow food foot forest forget form forward four free fresh friend
from front fruit full game garden gate gentle gift girl give glad glass go gold good grass gray great green ground group
grow guess hair half hall hand happy hard hat head hear heart heavy help here high hill history hold home hope horse
hot hour house hundred ice idea inside island job join journey keep key kind king kitchen lake land large last late
laugh learn leave left letter
"""
WORDS = tuple(_TEXT.split())


@dataclass(frozen=True, slots=True)
class Scale:
    """How this model counts: tokens = `fixed` (the chat template) + `per_word` * words."""

    fixed: float = 0.0
    per_word: float = 1.3
    measured: bool = False

    def words(self, tokens: int) -> int:
        return max(1, round((tokens - self.fixed) / self.per_word))


class Prompts:
    """The prompt of a request is the same whichever server is asked, except for its opening words."""

    def __init__(self, seed: int, run: str | None = None) -> None:
        self._seed = seed
        self.run = run or os.urandom(8).hex()

    def text(self, server: str, round_: str, index: int, words: int, shared: int = 0) -> str:
        """`words` words, of which the first `shared` are the same in all prompts of one seed."""
        common = Random(f"{self._seed}/shared").choices(WORDS, k=min(shared, words))
        opening = self._opening(server, round_, index)
        filler = Random(f"{self._seed}/{round_}/{index}").choices(WORDS, k=max(0, words - len(common) - len(opening)))
        return " ".join([*common, *opening, *filler][: max(words, len(common) + 1)])

    def _opening(self, server: str, round_: str, index: int) -> list[str]:
        mark = blake2b(f"{self.run}/{server}/{round_}/{index}".encode(), digest_size=4).digest()
        return [WORDS[byte] for byte in mark]
