"""What GGUF files are called."""

from __future__ import annotations

import re
from pathlib import PurePath

SUFFIX = ".gguf"
PART = re.compile(r"-\d{5}-of-\d{5}$")
_QUANTIZED = re.compile(r"[-._](i1-)?(iq|q|f|bf|tq)\d\w*$", re.IGNORECASE)


def model_name(path: str) -> str:
    """A file's name, or a folder's, without `.gguf` and the number of its part."""
    return PART.sub("", PurePath(path).name.removesuffix(SUFFIX))


def original_name(path: str) -> str:
    """The same without the quantization."""
    return _QUANTIZED.sub("", model_name(path))
