"""The program of `tests.support.collector`: writes what comes by OTLP over HTTP to a file, an export a line.

python -m tests.support.otlp_receiver PORT FILE

A line is a list of the items of one export.
"""

from __future__ import annotations

import gzip
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    file: Path
    lock = threading.Lock()
    seconds = 0.0
    status = 200
    keep = True
    # Set once it is to behave in another way.
    changed = threading.Event()

    def do_GET(self) -> None:
        self._reply(200)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.path == "/behave":
            asked = json.loads(body)
            type(self).seconds, type(self).status, type(self).keep = asked["seconds"], asked["status"], asked["keep"]
            before, type(self).changed = self.changed, threading.Event()
            before.set()
            self._reply(200)
            return
        self.changed.wait(self.seconds)
        if self.status == 200 and self.keep:
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            headers = {name.lower(): value for name, value in self.headers.items()}
            line = json.dumps([{**item, "headers": headers} for item in _decoded(self.path, body)]) + "\n"
            with self.lock, self.file.open("a") as file:
                file.write(line)
        self._reply(self.status)

    def _reply(self, status: int) -> None:
        self.send_response(status)
        self.send_header("content-type", "application/x-protobuf")
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None: ...


def _decoded(path: str, body: bytes) -> list[dict[str, Any]]:
    if path == "/v1/traces":
        return spans_of(ExportTraceServiceRequest.FromString(body))
    if path == "/v1/logs":
        return events_of(ExportLogsServiceRequest.FromString(body))
    return metrics_of(ExportMetricsServiceRequest.FromString(body))


def spans_of(request: Any) -> list[dict[str, Any]]:
    return [
        {
            "signal": "traces",
            "name": span.name,
            "trace_id": span.trace_id.hex(),
            "span_id": span.span_id.hex(),
            "parent": span.parent_span_id.hex(),
            "state": span.trace_state,
            "kind": span.kind,
            "start": span.start_time_unix_nano,
            "end": span.end_time_unix_nano,
            "status": span.status.code,
            "attributes": _attributes(span.attributes),
            "links": [link.trace_id.hex() for link in span.links],
            "resource": _attributes(resource.resource.attributes),
            "scope": scope.scope.name,
        }
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]


def events_of(request: Any) -> list[dict[str, Any]]:
    return [
        {
            "signal": "logs",
            "name": record.event_name,
            "trace_id": record.trace_id.hex(),
            "span_id": record.span_id.hex(),
            "attributes": _attributes(record.attributes),
        }
        for resource in request.resource_logs
        for scope in resource.scope_logs
        for record in scope.log_records
    ]


def metrics_of(request: Any) -> list[dict[str, Any]]:
    return [
        {
            "signal": "metrics",
            "name": metric.name,
            "unit": metric.unit,
            "count": point.count,
            "sum": point.sum,
            "bounds": list(point.explicit_bounds),
            "attributes": _attributes(point.attributes),
        }
        for resource in request.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
        for point in metric.histogram.data_points
    ]


def _attributes(attributes: Any) -> dict[str, Any]:
    return {attribute.key: _value(attribute.value) for attribute in attributes}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    return getattr(value, kind) if kind else None


if __name__ == "__main__":
    _Handler.file = Path(sys.argv[2])
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), _Handler).serve_forever()
