"""The examples for gateways and KubeRay: a cluster takes them, and they name what this server has."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import yaml

from serve.api.routes.server import router
from serve.config import load
from serve.server.ray_serve import shared
from tests.support.kubernetes import Manifest, manifests, problems

FOLDER = Path(__file__).parents[2] / "docker/kubernetes"


def objects(name: str) -> dict[str, Manifest]:
    return {manifest["kind"]: manifest for manifest in manifests((FOLDER / name).read_text())}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_cluster_takes_the_examples(path):
    assert [problem for manifest in manifests(path.read_text()) for problem in problems(manifest)] == []


def test_the_picker_reads_what_this_server_has_for_it():
    pool = objects("inference-pool.yaml")
    plugins = yaml.safe_load(pool["ConfigMap"]["data"]["plugins.yaml"])
    (path,) = [
        manifest["parameters"]["path"] for manifest in plugins["plugins"] if manifest["type"] == "metrics-data-source"
    ]
    assert path in {route.path for route in router.routes}
    used = {row["pluginRef"] for profile in plugins["schedulingProfiles"] for row in profile["plugins"]}
    assert used <= {row["type"] for row in plugins["plugins"]}
    picker = pool["InferencePool"]["spec"]["endpointPickerRef"]
    assert (picker["name"], picker["port"]["number"]) == (pool["Service"]["metadata"]["name"], 9002)
    labels = pool["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert pool["Service"]["spec"]["selector"].items() <= labels.items()
    assert not pool["InferencePool"]["spec"]["selector"]["matchLabels"].items() <= labels.items()


def test_kuberay_starts_what_the_command_line_starts(tmp_path):
    ray = objects("rayservice.yaml")
    serving = yaml.safe_load(ray["RayService"]["spec"]["serveConfigV2"])
    (application,) = serving["applications"]
    module, _, name = application["import_path"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    file = tmp_path / "loradock.yaml"
    file.write_text(ray["ConfigMap"]["data"]["loradock.yaml"])
    config = load(["--ray", "--config", str(file)], {"LORADOCK_REGISTRY": "postgresql+psycopg://h/n"})
    assert shared(config, several=True).replicas == 2
    cluster = ray["RayService"]["spec"]["rayClusterConfig"]
    (workers,) = cluster["workerGroupSpecs"]
    assert config.replicas <= workers["replicas"], "a replica takes a GPU"
    (worker,) = workers["template"]["spec"]["containers"]
    mounted = {mount["mountPath"] for mount in worker["volumeMounts"]}
    assert str(Path(application["args"]["config"]).parent) in mounted
    # KubeRay's own readiness probe of a worker calls wget.
    assert worker["readinessProbe"]["httpGet"] == {"path": "/-/healthz", "port": serving["http_options"]["port"]}


def test_the_example_runs_the_ray_that_is_pinned():
    wanted = (FOLDER.parents[1] / "pyproject.toml").read_text()
    version = objects("rayservice.yaml")["RayService"]["spec"]["rayClusterConfig"]["rayVersion"]
    assert f"ray[serve]=={version}" in wanted
