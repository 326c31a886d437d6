"""What is plain about one prompt: how it is written, and which language it is probably in.

Numbers by name, whose shares are compared with those of the first prompts (`detector.fixed_reference`): what was never
seen before is evident after a few prompts, and has a name.
"""

from __future__ import annotations

import zlib

from serve.drift.answer_facts import Facts
from serve.drift.detector.fixed_reference import Kind
from serve.drift.features.traffic_profile import Prompt
from serve.models.language import NAMES
from serve.models.text_marks import JAILBREAK, SAID

LANGUAGE = "language"
KINDS = dict.fromkeys(SAID, Kind.RARE_SHARE) | {LANGUAGE: Kind.RARE_NAME}
WEIGHTS = {JAILBREAK: 4.0, LANGUAGE: 4.0}
# The same over restarts and releases.
_NUMBERS = {language: float(zlib.crc32(language.encode())) for language in NAMES}


def prompt_facts(prompt: Prompt) -> Facts:
    """1 for each mark that it has, and the number of its language, 0 where that cannot be told."""
    facts = {mark: float(mark in prompt.marks) for mark in SAID}
    return facts | {LANGUAGE: _NUMBERS.get(prompt.language, 0.0)}
