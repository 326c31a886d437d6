"""The Helm chart, rendered by Helm's own library: a cluster takes what it makes, and it is what the server expects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve.config import load
from serve.config.settings import SETTINGS
from serve.telemetry.rendered.render import Places, render
from serve.telemetry.slo import DEFAULT_SLOS
from tests.support.kubernetes import Manifest, manifests, problems

helm = pytest.importorskip("helm_python", reason="Helm's library is not installed (PyPI: helm-python-sdk)")

ROOT = Path(__file__).parents[2]
CHART = ROOT / "docker/helm/loradock"
EXAMPLES = sorted(CHART.glob("examples/*.yaml"))
EVERYTHING: dict[str, Any] = {
    "config": {"model": "smollm2", "blobs": "s3://a/b", "slos": {"*": {"errors": {"target": 0.99}}}},
    "tlsSecret": "tls",
    "image": {"pullSecrets": [{"name": "registry"}]},
    "env": [{"name": "AWS_DEFAULT_REGION", "value": "eu-central-1"}],
    "envFrom": [{"secretRef": {"name": "s3"}}],
    "storage": {
        "className": "fast",
        "volumes": [{"name": "models", "persistentVolumeClaim": {"claimName": "models"}}],
        "mounts": [{"name": "models", "mountPath": "/models"}],
    },
    "service": {"type": "LoadBalancer", "annotations": {"a": "b"}},
    "serviceAccount": {"annotations": {"eks.amazonaws.com/role-arn": "x"}},
    "podAnnotations": {"a": "b"},
    "podLabels": {"team": "a"},
    "nodeSelector": {"gpu": "h100"},
    "tolerations": [{"operator": "Exists"}],
    "affinity": {"nodeAffinity": {}},
    "priorityClassName": "high",
    "runtimeClassName": "nvidia",
    "monitoring": {"enabled": True, "labels": {"release": "prometheus"}},
    "autoscaling": {"enabled": True},
}


def rendered(values: dict[str, Any] | None = None, name: str = "loradock") -> list[Manifest]:
    with helm.Chart.load(CHART) as chart:
        files = chart.render(values or {}, name=name, namespace="models")
    return [manifest for path, text in files.items() if path.endswith(".yaml") for manifest in manifests(text)]


def example(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def the(objects: list[Manifest], kind: str, name: str = "loradock") -> Manifest:
    (match,) = (manifest for manifest in objects if manifest["kind"] == kind and manifest["metadata"]["name"] == name)
    return match


def pod(objects: list[Manifest]) -> Manifest:
    return the(objects, "StatefulSet")["spec"]["template"]["spec"]


def environment(objects: list[Manifest]) -> dict[str, Any]:
    (container,) = pod(objects)["containers"]
    return {row["name"]: row.get("value", row.get("valueFrom")) for row in container["env"]}


@pytest.mark.parametrize(
    "values", [{}, EVERYTHING, *map(example, EXAMPLES)], ids=["defaults", "everything", *(e.stem for e in EXAMPLES)]
)
def test_a_cluster_takes_what_the_chart_makes(values):
    assert [problem for manifest in rendered(values) for problem in problems(manifest)] == []
    report = helm.lint(CHART, values, strict=True)
    assert report["errors"] == [] and [m for m in report["messages"] if m["severity"] > 1] == []


def test_a_mistake_in_a_manifest_would_be_seen():
    stateful = the(rendered(), "StatefulSet")
    stateful["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    assert any("readinesProbe" in problem for problem in problems(stateful))


@pytest.mark.parametrize("path", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_the_server_takes_the_configuration_that_an_example_gives_it(path, tmp_path):
    objects = rendered(example(path))
    file = tmp_path / "loradock.yaml"
    file.write_text(the(objects, "ConfigMap")["data"]["loradock.yaml"])
    variables = {name: value for name, value in environment(objects).items() if name.startswith("LORADOCK_")}
    assert {name.removeprefix("LORADOCK_").lower() for name in variables} <= {*SETTINGS, "config"}
    given = {name: value if isinstance(value, str) else "a-long-enough-key" for name, value in variables.items()}
    config = load([], {**given, "LORADOCK_CONFIG": str(file), "LORADOCK_REGISTRY": "postgresql+psycopg://h/n"})
    assert (config.host, config.port, config.open) == ("0.0.0.0", 8000, False)


def test_secrets_come_by_reference_only_and_values_that_hold_one_are_refused():
    secrets = environment(rendered(EVERYTHING))
    for name in ("ADMIN_KEYS", "API_KEYS", "METRICS_KEYS", "REGISTRY", "WEBHOOK_SECRET"):
        assert secrets[f"LORADOCK_{name}"]["secretKeyRef"]["name"] == "loradock"
        with pytest.raises(helm.HelmError, match=name.lower()):
            rendered({"config": {name.lower(): "secret"}})
    assert "Secret" not in {manifest["kind"] for manifest in rendered(EVERYTHING)}


def test_an_unknown_value_is_refused():
    with pytest.raises(helm.HelmError, match="replica"):
        rendered({"replica": 3})


def test_several_servers_need_a_place_for_adapters_and_a_registry():
    for values in ({"replicas": 2}, {"autoscaling": {"enabled": True}}):
        with pytest.raises(helm.HelmError, match="blobs"):
            rendered(values)
        registry = environment(rendered({**values, "config": {"model": "m", "blobs": "s3://a/b"}}))["LORADOCK_REGISTRY"]
        assert "optional" not in registry["secretKeyRef"], "without its key the pod does not start"
    assert environment(rendered())["LORADOCK_REGISTRY"]["secretKeyRef"]["optional"] is True


def test_nobody_is_root_and_nothing_is_writable_but_what_the_server_writes():
    spec = pod(rendered(EVERYTHING))
    (container,) = spec["containers"]
    assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] == 10001
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not spec["automountServiceAccountToken"]
    for device in ("cpu", "gpu"):
        dockerfile = (ROOT / f"docker/Dockerfile.{device}").read_text()
        assert "USER 10001:10001" in dockerfile and "VOLUME /var/lib/loradock" in dockerfile
    writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
    assert writable == {"/var/lib/loradock", "/tmp", "/dev/shm", "/models"}


def test_probes_ask_what_the_server_answers_and_the_end_waits_for_answers():
    objects = rendered({"gracePeriod": 100, "drainSeconds": 7, "startupMinutes": 10})
    (container,) = pod(objects)["containers"]
    probes = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")}
    assert probes == {"startup": "/ready", "readiness": "/ready", "liveness": "/health"}
    assert container["startupProbe"]["failureThreshold"] * container["startupProbe"]["periodSeconds"] == 600
    assert pod(objects)["terminationGracePeriodSeconds"] >= 100 + 7
    assert environment(objects)["LORADOCK_GRACE_PERIOD"] == "100"
    (container,) = pod(rendered({"tlsSecret": "tls"}))["containers"]
    assert {container[f"{name}Probe"]["httpGet"]["scheme"] for name in probes} == {"HTTPS"}


def test_rules_and_dashboards_are_those_that_the_server_renders():
    objects = rendered({"monitoring": {"enabled": True}})
    files = render(DEFAULT_SLOS, Places())
    assert the(objects, "PrometheusRule")["spec"] == yaml.safe_load(files["prometheus/rules.yml"])
    boards = {Path(name).name: json.loads(text) for name, text in files.items() if name.startswith("dashboards/")}
    maps = [
        manifest["data"]
        for manifest in objects
        if manifest["kind"] == "ConfigMap" and "loradock.yaml" not in manifest["data"]
    ]
    assert {name: json.loads(text) for data in maps for name, text in data.items()} == boards
    mine = {"groups": [{"name": "mine", "rules": [{"alert": "A", "expr": "up == 0"}]}]}
    own = rendered({"monitoring": {"enabled": True, "rules": yaml.safe_dump(mine)}})
    assert the(own, "PrometheusRule")["spec"] == mine


def test_prometheus_finds_each_server_and_brings_the_key():
    objects = rendered({"monitoring": {"enabled": True}})
    monitor = the(objects, "ServiceMonitor")["spec"]
    labels = the(objects, "Service", "loradock-servers")["metadata"]["labels"]
    assert monitor["selector"]["matchLabels"].items() <= labels.items()
    assert not monitor["selector"]["matchLabels"].items() <= the(objects, "Service")["metadata"]["labels"].items()
    assert labels[monitor["jobLabel"]] == "loradock", "the rules ask for this job"
    (endpoint,) = monitor["endpoints"]
    assert endpoint["authorization"]["credentials"] == {"name": "loradock", "key": "metrics-keys"}


def test_more_servers_come_by_queue_and_first_token():
    objects = rendered({"config": {"model": "m", "blobs": "s3://a/b"}, "autoscaling": {"enabled": True}})
    assert "replicas" not in the(objects, "StatefulSet")["spec"], "an upgrade would undo what was scaled"
    requests, first = the(objects, "ScaledObject")["spec"]["triggers"]
    here = '{namespace="models",service="loradock-servers"}'
    assert f"sum(vllm:num_requests_waiting{here})" in requests["metadata"]["query"]
    assert f"loradock_time_to_first_token_seconds_sum{here}[2m]" in first["metadata"]["query"]


def test_two_releases_in_one_namespace_do_not_meet():
    first, second = rendered(EVERYTHING, "first"), rendered(EVERYTHING, "second")
    names = [{(manifest["kind"], manifest["metadata"]["name"]) for manifest in objects} for objects in (first, second)]
    assert names[0].isdisjoint(names[1])
    selectors = [
        the(objects, "Service", name)["spec"]["selector"] for objects, name in ((first, "first"), (second, "second"))
    ]
    assert selectors[0] != selectors[1]


def test_a_network_policy_lets_nobody_in_but_those_who_are_named():
    policy = the(rendered({"networkPolicy": {"from": []}}), "NetworkPolicy")["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"] and policy["ingress"] == []
    policy = the(rendered(), "NetworkPolicy")["spec"]
    assert policy["ingress"] == [{"from": [{"podSelector": {}}], "ports": [{"port": "http"}]}]
    assert "NetworkPolicy" not in {manifest["kind"] for manifest in rendered({"networkPolicy": {"enabled": False}})}


def test_several_servers_tell_each_other_where_they_are_and_may_meet():
    values = {"replicas": 2, "config": {"blobs": "s3://a/b"}, "networkPolicy": {"from": []}}
    objects = rendered(values)
    address = environment(objects)["LORADOCK_FLEET_ADDRESS"]
    assert address == "http://$(POD_NAME).loradock-servers.models.svc:8000"
    assert the(objects, "Service", "loradock-servers")["spec"]["ports"][0]["port"] == 8000
    policy = the(objects, "NetworkPolicy")["spec"]
    ours = {"podSelector": the(objects, "StatefulSet")["spec"]["selector"]}
    assert policy["ingress"] == [{"from": [ours], "ports": [{"port": "http"}]}]
    assert {"to": [ours], "ports": [{"port": "http"}]} in policy["egress"]
    for other in ({}, {**values, "tlsSecret": "tls"}):
        assert "LORADOCK_FLEET_ADDRESS" not in environment(rendered(other))
