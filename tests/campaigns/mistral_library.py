"""mistral.rs as the package mistralrs carries it, for `tests.campaigns.real_models`; run by a Python that has it.

    python mistral_library.py FILE PORT STREAMS ENDS

A small HTTP server of our own before the package's `Runner`, which has none: `/health`, and `/v1/completions` that
streams. The prompt goes in as it is, without a chat template, and an event is sent for each piece that comes out. ENDS
are the ids of tokens that end an answer, with commas: they are never chosen, as with `ignore_eos`.
"""

from __future__ import annotations

import importlib
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PACKAGE: Any = importlib.import_module("mistralrs")


class Handler(BaseHTTPRequestHandler):
    runner: Any = None
    ends: dict[int, float] = {}  # noqa: RUF012

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
    which = PACKAGE.Which.GGUF(quantized_model_id=str(file.parent), quantized_filename=file.name)
    Handler.runner = PACKAGE.Runner(which=which, max_seqs=streams, prefix_cache_n=0)
    ThreadingHTTPServer.request_queue_size = 64
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    main()
