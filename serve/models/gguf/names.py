"""What GGUF files are called, and begin with."""

from __future__ import annotations

import re
from pathlib import PurePath

SUFFIX = ".gguf"
MAGIC = b"GGUF"  # its first bytes, whatever the file is called
PART = re.compile(r"-\d{5}-of-(\d{5})$")
_QUANTIZED = re.compile(r"[-._](i1-)?(iq|q|f|bf|tq)\d\w*$", re.IGNORECASE)


def model_name(path: str) -> str:
    """A file's name, or a folder's, without `.gguf` and the number of its part."""
    name = PurePath(path).name
    return PART.sub("", name[: -len(SUFFIX)] if name.lower().endswith(SUFFIX) else name)


def original_name(path: str) -> str:
    """The same without the quantization."""
    return _QUANTIZED.sub("", model_name(path))
