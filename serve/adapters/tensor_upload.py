"""An upload without files: a safetensors body, and its PEFT configuration in a header or in the body's own metadata.

    Content-Type: application/octet-stream     the body is what `safetensors.torch.save(tensors)` gives
    X-Adapter-Config: {"peft_type": "LORA", "r": 8, ...}     or the metadata's `adapter_config`, the same JSON

What arrives becomes the two files that any other upload leaves, and is judged like one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import IO

from serve.adapters.adapter import CONFIG, WEIGHTS
from serve.adapters.byte_ledger import Kind, Room
from serve.adapters.file_thread import in_turn
from serve.adapters.multipart_form import pieces
from serve.adapters.shards import join
from serve.adapters.tensors import read_metadata
from serve.adapters.untrusted import create, open_plain, write
from serve.errors import BadRequest, TooLarge

KINDS = ("application/octet-stream", "application/vnd.safetensors", "application/safetensors")
CONFIG_HEADER = "x-adapter-config"
METADATA = "adapter_config"

# Bytes that are written at a time, on another thread than the event loop's.
_STEP = 1 << 20


async def receive_tensors(
    stream: AsyncIterator[bytes], config: bytes | None, folder: Path, room: Room, *, max_bytes: int
) -> None:
    """Leave the adapter's two files in `folder`; `config` is the configuration's JSON, None if the body has it.

    Each byte is taken from the `room` before it is written.
    """
    too_large = TooLarge(f"this upload is above the {max_bytes} bytes that this server takes")
    sink = await asyncio.to_thread(create, folder / WEIGHTS)
    try:
        is_empty = True
        async for piece in pieces(stream, _STEP, max_bytes, too_large):
            is_empty = False
            await asyncio.to_thread(_write, sink, piece, room)
        if is_empty:
            raise BadRequest("the body is empty: send the tensors in the safetensors format")
    finally:
        await asyncio.to_thread(sink.close)
    await in_turn(_finish, folder, config, room.beside(Kind.UNPACKED))


def _write(sink: IO[bytes], piece: bytes, room: Room) -> None:
    room.take(len(piece))
    write(sink, piece)


def _finish(folder: Path, config: bytes | None, room: Room) -> None:
    if config is None:
        with open_plain(folder / WEIGHTS) as file:
            config = read_metadata(file).get(METADATA, "").encode("utf-8", "surrogatepass")
    if not config:
        raise BadRequest(
            f"the adapter's configuration is missing: send PEFT's JSON in the header {CONFIG_HEADER}, or save the "
            f"tensors with metadata={{'{METADATA}': JSON}}",
            param=CONFIG_HEADER,
        )
    with create(folder / CONFIG) as sink:
        write(sink, config)
    join(folder, room.take)
