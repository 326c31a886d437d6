"""Which tokens of a checkpoint's vocabulary are made of digits."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

log = logging.getLogger(__name__)

# A token of digits, with what tokenizers write for a space before it or for the inside of a word.
_NUMBER = re.compile(r"[ \u0120\u2581]*(?:##)?\d+")


def number_tokens(checkpoint: Path, vocabulary: int) -> NDArray[np.bool_] | None:
    """(vocabulary + 1,) which tokens of a checkpoint folder are made of digits; None where its files do not say."""
    numbers = np.zeros(vocabulary + 1, np.bool_)
    try:
        if (file := checkpoint / "tokenizer.json").is_file():
            tokens = json.loads(file.read_bytes())["model"]["vocab"]
        elif (file := checkpoint / "vocab.json").is_file():
            tokens = json.loads(file.read_bytes())
        else:
            return None
        # Unigram tokenizers list (token, score) in the order of their numbers.
        pairs = tokens.items() if isinstance(tokens, dict) else ((entry[0], i) for i, entry in enumerate(tokens))
        for token, number in pairs:
            if 0 <= number < vocabulary and _NUMBER.fullmatch(token):
                numbers[number] = True
    except (OSError, ValueError, KeyError, TypeError, IndexError) as damaged:
        log.warning("%s: which tokens are numbers is not known: %s", file, damaged)
        return None
    return numbers
