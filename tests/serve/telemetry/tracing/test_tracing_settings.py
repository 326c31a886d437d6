from __future__ import annotations

import pytest

from serve.config import load
from serve.errors import ConfigError
from serve.telemetry.tracing.tracing_settings import TracingSettings

URL = "http://collector:4318"


def test_nothing_is_wanted_until_an_endpoint_is_set():
    assert not TracingSettings.of({"OTEL_SERVICE_NAME": "mine", "OTEL_TRACES_SAMPLER": "always_on"}).wanted
    assert not TracingSettings.of({"OTEL_EXPORTER_OTLP_ENDPOINT": " "}).wanted
    assert not load([], {}).otel.wanted


@pytest.mark.parametrize(
    ("environ", "signals"),
    [
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": URL}, {"traces", "metrics", "logs"}),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{URL}/v1/traces"}, {"traces"}),
        ({"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": f"{URL}/v1/metrics"}, {"metrics"}),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": URL, "OTEL_METRICS_EXPORTER": "none"}, {"traces", "logs"}),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": URL, "OTEL_TRACES_EXPORTER": "console, otlp"}, {"traces", "metrics", "logs"}),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": URL, "OTEL_SDK_DISABLED": "TRUE"}, set()),
    ],
)
def test_a_signal_is_wanted_if_it_has_an_endpoint_and_no_other_exporter(environ, signals):
    assert set(load([], environ).otel.protocols) == signals


@pytest.mark.parametrize(
    ("environ", "protocol"),
    [
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": URL}, "http/protobuf"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4317"}, "grpc"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "collector:4317"}, "grpc"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": URL, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "grpc"),
        (
            {
                "OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4317",
                "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
                "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
            },
            "http/protobuf",
        ),
    ],
)
def test_the_protocol_is_the_one_that_was_chosen_or_that_the_port_is_known_for(environ, protocol):
    assert TracingSettings.of(environ).protocols["traces"] == protocol


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json", "takes grpc or http/protobuf, not 'http/json'"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "-1", "takes a whole number above 0, not '-1'"),
        ("OTEL_BSP_SCHEDULE_DELAY", "5s", "takes a whole number above 0, not '5s'"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:port", "takes a URL, not"),
    ],
)
def test_what_is_not_taken_is_a_sentence(name, value, sentence):
    with pytest.raises(ConfigError, match=f"^{name} ") as refused:
        load([], {"OTEL_EXPORTER_OTLP_ENDPOINT": URL, name: value})
    assert sentence in str(refused.value)


def test_sizes_and_pauses_are_those_of_the_variables():
    settings = TracingSettings.of(
        {
            "OTEL_EXPORTER_OTLP_ENDPOINT": URL,
            "OTEL_BSP_MAX_QUEUE_SIZE": "100",
            "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "500",
            "OTEL_BSP_SCHEDULE_DELAY": "250",
            "OTEL_METRIC_EXPORT_INTERVAL": "1500",
        }
    )
    assert (settings.queue_size, settings.batch_size, settings.delay, settings.metric_interval) == (100, 100, 0.25, 1.5)
