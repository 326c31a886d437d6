import random
import struct
from pathlib import Path

import pytest

from serve.errors import ConfigError
from serve.models.gguf.families import plan
from serve.models.gguf.file import GGUF
from tests.support.gguf_files import write

HEADER = 6_000  # bytes: metadata and the list of tensors lie there


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    return write(tmp_path_factory.mktemp("gguf") / "a.gguf").read_bytes()


def read(data: bytes, folder: Path) -> None:
    """As far as the weights."""
    path = folder / "broken.gguf"
    path.write_bytes(data)
    plan(GGUF.open(path))


@pytest.mark.parametrize("seed", range(200))
def test_a_file_with_changed_bytes_is_read_or_refused_in_a_sentence(seed, whole, tmp_path):
    rng = random.Random(seed)
    data = bytearray(whole)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(HEADER)
        how = rng.randrange(4)
        if how == 0:
            data[at] = rng.randrange(256)
        elif how == 1:
            data[at : at + 8] = struct.pack(
                "<Q", rng.choice((0, 1 << 31, 1 << 63, (1 << 64) - 1, rng.randrange(1 << 40)))
            )
        elif how == 2:
            del data[at : at + rng.randrange(1, 64)]
        else:
            data = data[: rng.randrange(len(data))]
    try:
        read(bytes(data), tmp_path)
    except ConfigError as refused:
        assert "broken.gguf" in refused.message or "tensor" in refused.message


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "cannot be read"),
        (b"PK\3\4" + bytes(60), "does not begin with the letters GGUF"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 40, 0), "as its tensors: at most"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 40), "as its keys: at most"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1 << 60), "as the length of a key"),
        # A list of lists of lists, and one of more texts than the file could hold.
        (
            b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQIQIQ", 9, 9, 1, 9, 1, 9, 1),
            "unknown type",
        ),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 8, 4_000_000), "ends within k"),
    ],
)
def test_headers_that_promise_more_than_there_is(data, sentence, tmp_path):
    with pytest.raises(ConfigError, match=sentence):
        read(data, tmp_path)


def test_no_tensor_lies_over_another_or_beyond_the_end(whole, tmp_path):
    with pytest.raises(ConfigError, match="cut off"):
        read(whole[:-64], tmp_path)
    name = b"blk.0.ffn_norm.weight"
    at = whole.index(name) + len(name) + 4 + 8 + 4  # after its dimensions: where it begins
    with pytest.raises(ConfigError, match="does not lie where it may"):
        read(whole[:at] + bytes(8) + whole[at + 8 :], tmp_path)
