"""Whether a file has a JSON object a line: what is looked at as soon as examples to train on have arrived."""

from __future__ import annotations

from pathlib import Path

import msgspec

from serve.asgi.json_weight import decoded
from serve.errors import BadRequest, TooLarge
from serve.names import shown

# Nothing is built of what it holds.
_decode = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
# Of one line.
MAX_BYTES = 16 << 20
_WANTED = "Expected file to have JSONL format, where every line is a valid JSON dictionary"


def check_objects(path: Path) -> None:
    """BadRequest names the first line that is none. What the objects say is looked at when a job reads them. Blocks."""
    objects = number = 0
    with path.open("rb") as file:
        while line := file.readline(MAX_BYTES + 1):
            number += 1
            if len(line) > MAX_BYTES:
                raise _refused(f"Line {number} is above {MAX_BYTES >> 20} MiB.")
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not line.strip():
                continue
            try:
                decoded(line, _decode)
            except (BadRequest, TooLarge) as error:
                raise _refused(f"Line {number}: {error.message}.") from error
            except msgspec.ValidationError as error:
                raise _refused(
                    f"Line {number} is not a dictionary (HINT: line starts with: {_start(line)})."
                ) from error
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise _refused(f"Line {number} is not JSON ({shown(error)}).") from error
            objects += 1
    if not objects:
        raise _refused("The file is empty.")


def _start(line: bytes) -> str:
    return shown(line[:20].decode("utf-8", "replace").strip())


def _refused(why: str) -> BadRequest:
    return BadRequest(f"Invalid file format. {_WANTED}. {why}", code="invalid_file_format", param="file")
