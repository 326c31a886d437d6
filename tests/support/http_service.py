"""Small HTTP services of this machine that stand for large ones elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Handler(BaseHTTPRequestHandler):
    """Answers a request of `service`, and prints nothing."""

    protocol_version = "HTTP/1.1"
    service: Any

    def reply(
        self, status: int, body: bytes = b"", headers: Mapping[str, str] = {}, *, stop: int | None = None
    ) -> None:
        """With `stop` the connection ends after so many bytes of the body."""
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:stop])
        if stop is not None:
            self.close_connection = True

    def log_message(self, *_: object) -> None: ...


@contextmanager
def serving(handler: type[Handler], service: object = None) -> Iterator[str]:
    """The URL at which `handler` answers for `service`."""
    bound = type(handler.__name__, (handler,), {"service": service})
    server = ThreadingHTTPServer(("127.0.0.1", 0), bound)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
