"""The audio packages as PyPI has them beside torch's CPU build: installed, and not to be imported."""

from __future__ import annotations

from pathlib import Path


def for_cuda(folder: Path) -> Path:
    """The folder, for PYTHONPATH, with torch's CPU build and a torchaudio that wants CUDA's libraries."""
    for name, version in (("torch", "2.13.0+cpu"), ("torchaudio", "2.11.0")):
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (folder / "torchaudio.py").write_text("raise OSError('libc10_cuda.so: cannot open shared object file')\n")
    return folder
