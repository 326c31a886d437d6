"""llama.cpp as the package xllamacpp carries it, for `tests.campaigns.real_models`; run by a Python that has it.

    python llama_library.py serve FILE PORT STREAMS    its own server, until it is killed
    python llama_library.py logits FILE < windows      the vocabulary (int32), then the logits of each token (float32)

Windows are JSON, lists of token ids.

The server is the package's. Logits come from llama.cpp's own functions, which its library exports: structures of
options are taken as they come from it, and only their first numbers are known here.
"""

from __future__ import annotations

import ctypes
import glob
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO

PACKAGE: Any = importlib.import_module("xllamacpp")
THREADS = 4  # llama.cpp's own default, by which the two fields of it are found


class Options(ctypes.Structure):
    _fields_ = (("words", ctypes.c_uint32 * 128),)


class Batch(ctypes.Structure):
    _fields_ = (
        ("count", ctypes.c_int32),
        ("tokens", ctypes.POINTER(ctypes.c_int32)),
        ("embeddings", ctypes.c_void_p),
        ("positions", ctypes.POINTER(ctypes.c_int32)),
        ("sequence_counts", ctypes.POINTER(ctypes.c_int32)),
        ("sequences", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


class Library:
    """One model, and a context of so many tokens."""

    def __init__(self, file: str, tokens: int) -> None:
        (path,) = glob.glob(str(Path(str(PACKAGE.__file__)).parent / "xllamacpp*.so"))
        self._functions = ctypes.CDLL(path)
        self._call("llama_backend_init", None)
        model = self._call("llama_model_load_from_file", ctypes.c_void_p, file.encode(), self._options("model"))
        options = self._options("context")
        options.words[0] = options.words[1] = options.words[2] = tokens
        words = list(options.words[:12])
        at = next(place for place in range(3, 11) if words[place] == words[place + 1] == THREADS)
        options.words[at] = options.words[at + 1] = os.cpu_count() or 1
        context = self._call("llama_init_from_model", ctypes.c_void_p, ctypes.c_void_p(model), options)
        if not model or not context:
            raise SystemExit(f"llama.cpp does not load {file}")
        self._context = ctypes.c_void_p(context)
        words_of = self._call("llama_model_get_vocab", ctypes.c_void_p, ctypes.c_void_p(model))
        self.vocabulary = self._call("llama_vocab_n_tokens", ctypes.c_int32, ctypes.c_void_p(words_of))
        self._memory = self._call("llama_get_memory", ctypes.c_void_p, self._context)
        self._batch = self._call("llama_batch_init", Batch, tokens, 0, 1)

    def write(self, window: list[int], out: BinaryIO) -> None:
        """The logits after each token."""
        self._call("llama_memory_clear", None, ctypes.c_void_p(self._memory), ctypes.c_bool(True))
        batch = self._batch
        batch.count = len(window)
        for at, token in enumerate(window):
            batch.tokens[at], batch.positions[at] = token, at
            batch.sequence_counts[at], batch.sequences[at][0] = 1, 0
            batch.logits[at] = 1
        if self._call("llama_decode", ctypes.c_int32, self._context, batch):
            raise SystemExit("llama_decode failed")
        for at in range(len(window)):
            row = self._call("llama_get_logits_ith", ctypes.c_void_p, self._context, at)
            out.write(ctypes.string_at(row, 4 * self.vocabulary))

    def _options(self, kind: str) -> Options:
        options = self._call(f"llama_{kind}_default_params", Options)
        assert isinstance(options, Options)
        return options

    def _call(self, name: str, result: Any, *arguments: Any) -> Any:
        function = getattr(self._functions, name)
        function.restype = result
        return function(*arguments)


def serve(file: str, port: int, streams: int) -> None:
    options = PACKAGE.CommonParams()
    options.model.path = file
    options.port = port
    options.n_parallel = streams
    options.n_ctx = 2048 * streams
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = os.cpu_count() or 1
    server = PACKAGE.Server(options)
    print(server.listening_address, flush=True)
    while True:
        time.sleep(60)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    windows = json.load(sys.stdin)
    library = Library(sys.argv[2], max(map(len, windows)))
    sys.stdout.buffer.write(library.vocabulary.to_bytes(4, "little"))
    for window in windows:
        library.write(window, sys.stdout.buffer)
