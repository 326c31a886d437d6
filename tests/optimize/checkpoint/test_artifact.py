"""What a killed run leaves is whole, or is not there."""

from __future__ import annotations

import pytest

from optimize.checkpoint import artifact


def test_a_file_takes_its_place_only_when_it_is_whole(tmp_path):
    file = tmp_path / "state"
    with pytest.raises(KeyboardInterrupt), artifact.replaced(file) as out:
        out.write(b"half")
        raise KeyboardInterrupt
    assert not file.exists()
    for whole in (b"first", b"second"):
        with artifact.replaced(file) as out:
            out.write(whole)
        assert file.read_bytes() == whole
