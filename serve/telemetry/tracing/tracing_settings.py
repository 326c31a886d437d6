"""What OpenTelemetry's own environment variables ask for: which signals, over which protocol, how much may wait.

https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables. Endpoints, headers, certificates,
timeouts, compression, the sampler and the resource are read by the SDK itself; here is what decides whether there is
one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from serve.errors import ConfigError

TRACES, METRICS, LOGS = SIGNALS = ("traces", "metrics", "logs")
GRPC, HTTP = PROTOCOLS = ("grpc", "http/protobuf")
# The port that collectors take gRPC at.
GRPC_PORT = 4317


@dataclass(frozen=True, slots=True)
class TracingSettings:
    """`protocols` has the signals that are wanted; none, and nothing of OpenTelemetry is imported.

    Of spans, `queue_size` may wait for the collector and `batch_size` go in one request, after `delay` seconds at the
    latest. Metrics go every `metric_interval` seconds.
    """

    protocols: Mapping[str, str] = field(default_factory=dict)  # plain: it travels to replicas
    # 3,000 requests; OpenTelemetry's default of 2,048 spans holds 400.
    queue_size: int = 16_384
    # Encoding holds the interpreter's lock: small batches let tokens pass between them.
    batch_size: int = 128
    delay: float = 5.0
    metric_interval: float = 60.0

    @property
    def wanted(self) -> bool:
        return bool(self.protocols)

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> TracingSettings:
        """The settings in an environment; ConfigError for a value that is not taken."""
        if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
            return cls()
        protocols = {signal: _protocol(signal, environ) for signal in SIGNALS if _is_wanted(signal, environ)}
        if not protocols:
            return cls()
        usual = cls()
        queue_size = _whole("OTEL_BSP_MAX_QUEUE_SIZE", usual.queue_size, environ)
        return cls(
            protocols,
            queue_size,
            min(queue_size, _whole("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", usual.batch_size, environ)),
            _whole("OTEL_BSP_SCHEDULE_DELAY", round(1000 * usual.delay), environ) / 1000,
            _whole("OTEL_METRIC_EXPORT_INTERVAL", round(1000 * usual.metric_interval), environ) / 1000,
        )


def _is_wanted(signal: str, environ: Mapping[str, str]) -> bool:
    """It has an endpoint, and no other exporter was chosen for it."""
    exporters = environ.get(f"OTEL_{signal.upper()}_EXPORTER", "").replace(" ", "").lower()
    return bool(_endpoint(signal, environ)) and (not exporters or "otlp" in exporters.split(","))


def _endpoint(signal: str, environ: Mapping[str, str]) -> str:
    own = environ.get(f"OTEL_EXPORTER_OTLP_{signal.upper()}_ENDPOINT", "").strip()
    return own or environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "").strip()


def _protocol(signal: str, environ: Mapping[str, str]) -> str:
    """As it was chosen; otherwise what the endpoint's port is known for."""
    names = (f"OTEL_EXPORTER_OTLP_{signal.upper()}_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    for name in names:
        if protocol := environ.get(name, "").strip().lower():
            if protocol not in PROTOCOLS:
                raise ConfigError(f"{name} takes {' or '.join(PROTOCOLS)}, not {protocol[:40]!r}")
            return protocol
    endpoint = _endpoint(signal, environ)
    try:
        port = urlsplit(endpoint if "//" in endpoint else f"//{endpoint}").port
    except ValueError as error:
        raise ConfigError(f"OTEL_EXPORTER_OTLP_ENDPOINT takes a URL, not {endpoint[:80]!r}") from error
    return GRPC if port == GRPC_PORT else HTTP


def _whole(name: str, default: int, environ: Mapping[str, str]) -> int:
    text = environ.get(name, "").strip()
    if not text:
        return default
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 1 << 31):
        raise ConfigError(f"{name} takes a whole number above 0, not {text[:40]!r}")
    return int(text)
