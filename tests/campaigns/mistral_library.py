"""mistral.rs as the package mistralrs carries it, for `tests.campaigns.real_models`; run by a Python that has it.

    python mistral_library.py FILE PORT STREAMS ENDS [ADAPTER ...]

A small HTTP server of our own before the package's `Runner`, which has none: `/health`, and `/v1/completions` that
streams. The prompt goes in as it is, without a chat template, and an event is sent for each piece that comes out. ENDS
are the ids of tokens that end an answer, with commas: they are never chosen, as with `ignore_eos`. Each ADAPTER is a
folder in PEFT's format, and a request's `model` is the name of its folder. With `ISQ` in the environment weights are
rounded anew to that type as they are loaded: candle multiplies Q5_0, of which files of 0.5B consist, number by number.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

PACKAGE: Any = importlib.import_module("mistralrs")


class Handler(BaseHTTPRequestHandler):
    runner: Any = None
    ends: dict[int, float] = {}  # noqa: RUF012
    adapters: frozenset[str] = frozenset()

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        request = PACKAGE.ChatCompletionRequest(
            messages=body["prompt"],
            model="default",
            max_tokens=body["max_tokens"],
            temperature=0.0,
            logit_bias=self.ends,
            stream=True,
            adapter=body["model"] if body["model"] in self.adapters else None,
        )
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        for chunk in self.runner.send_chat_completion_request(request):
            if chunk.choices[0].delta.content is not None:
                event = {"choices": [{"text": chunk.choices[0].delta.content}]}
                self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


def main() -> None:
    file, port, streams = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    Handler.ends = {int(word): -100.0 for word in sys.argv[4].split(",")}
    adapters = [PACKAGE.LoraAdapter(alias=Path(word).name, source=word) for word in sys.argv[5:]]
    Handler.adapters = frozenset(adapter.alias for adapter in adapters)
    model = {"quantized_model_id": str(file.parent), "quantized_filename": file.name}
    which = PACKAGE.Which.GGUF(**model, adapters=adapters or None)
    isq = os.environ.get("ISQ")
    with NamedTemporaryFile("w", suffix=".jinja") as template:  # without one a prompt goes through the file's
        template.write("{{ messages[0]['content'] }}")
        template.flush()
        Handler.runner = PACKAGE.Runner(
            which=which, max_seqs=streams, prefix_cache_n=0, in_situ_quant=isq, jinja_explicit=template.name
        )
    ThreadingHTTPServer.request_queue_size = 64
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    main()
