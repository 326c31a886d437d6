"""The images and the composition keep what a container should. compose-spec.json is compose-spec's own schema."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from dockerfile_parse import DockerfileParser
from jsonschema import Draft7Validator

from serve.telemetry.rendered.render import ALERT_KEY, SCRAPE_KEY, Places, render
from serve.telemetry.slo import DEFAULT_SLOS

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "docker/compose.yaml"
PINNED = re.compile(r"[\w./-]+:v?\d+\.\d+\.\d+[\w.-]*")


# compose reads this file by itself: it lies beside compose.yaml.
IMAGES = dict(line.split("=", 1) for line in (ROOT / "docker/.env").read_text().splitlines() if line[:1] not in "#")


def interpolated(value: Any) -> Any:
    """As compose does it, with the variables of docker/.env, and every other one that has no default set to `x`."""
    if isinstance(value, str):
        return re.sub(
            r"\$\{(\w+)(?::([-?])([^}]*))?\}",
            lambda match: IMAGES.get(match[1]) or (match[3] if match[2] == "-" else "x"),
            value,
        )
    if isinstance(value, dict):
        return {key: interpolated(one) for key, one in value.items()}
    return [interpolated(one) for one in value] if isinstance(value, list) else value


@pytest.fixture
def compose() -> dict[str, Any]:
    return interpolated(yaml.safe_load(COMPOSE.read_text()))


def test_the_composition_is_one(compose):
    schema = json.loads((Path(__file__).parent / "compose-spec.json").read_text())
    assert [error.message for error in Draft7Validator(schema).iter_errors(compose)] == []
    broken = {**compose, "services": {"x": {"imagee": "a"}}}
    assert not Draft7Validator(schema).is_valid(broken)


def test_one_server_is_chosen_by_its_profile_and_the_rest_find_it_by_one_name(compose):
    services = compose["services"]
    assert {name: one["profiles"] for name, one in services.items() if "profiles" in one} == {
        "loradock-cpu": ["cpu"],
        "loradock-gpu": ["gpu"],
        "jaeger": ["tracing"],
    }
    places = Places()
    for name in ("loradock-cpu", "loradock-gpu"):
        assert services[name]["networks"]["default"]["aliases"] == [places.server.partition(":")[0]]
    others = (places.prometheus, places.alertmanager, places.jaeger)
    assert {other.partition(":")[0] for other in others} <= set(services)
    assert services["loradock-gpu"]["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]


def test_what_is_mounted_is_there_and_is_what_is_rendered(compose):
    mounted = set()
    for service in compose["services"].values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (COMPOSE.parent / source).exists(), source
                assert volume.endswith(":ro"), volume
                mounted.add((COMPOSE.parent / source).resolve().relative_to(ROOT / "grafana").as_posix())
            else:
                assert source in compose["volumes"], source
    for name in render(DEFAULT_SLOS, Places()):
        if name.endswith("receivers-example.yml"):  # shows what may be written into the other one
            continue
        assert any(name == one or name.startswith(one + "/") for one in mounted), f"nobody reads {name}"


def test_each_key_lies_where_the_configuration_looks_for_it(compose):
    said = {one["target"] for service in compose["services"].values() for one in service.get("secrets", [])}
    assert said == {f"/etc/prometheus/{SCRAPE_KEY}", f"/etc/alertmanager/{ALERT_KEY}"}
    grafana = compose["services"]["grafana"]["volumes"]
    provider = yaml.safe_load(render(DEFAULT_SLOS, Places())["provisioning/dashboards/loradock.yml"])
    path = provider["providers"][0]["options"]["path"]
    assert any(f":{path}:" in volume for volume in grafana)


def test_nothing_listens_beyond_this_machine_and_nothing_has_more_rights_than_it_needs(compose):
    for name, service in compose["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
        assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"], name
        assert not service.get("privileged") and "docker.sock" not in str(service), name
        assert "build" in service or PINNED.fullmatch(service["image"]), service["image"]


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_an_image_is_built_in_stages_pinned_small_healthy_and_nobodys_root(device, tmp_path):
    parser = DockerfileParser(path=str(tmp_path))
    parser.content = (ROOT / f"docker/Dockerfile.{device}").read_text()
    steps = parser.structure
    kinds = [step["instruction"] for step in steps]
    assert len(parser.parent_images) == 2 and len(set(parser.parent_images)) == 1
    assert all(PINNED.fullmatch(image) for image in parser.parent_images)
    final = [
        step for step in steps if step["startline"] > [s["startline"] for s in steps if s["instruction"] == "FROM"][1]
    ]
    last = {step["instruction"]: step["value"] for step in final}
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", last["USER"])
    assert json.loads(last["ENTRYPOINT"]) == ["loradock", "serve"]
    assert "/ready" in last["HEALTHCHECK"] and "--start-period" in last["HEALTHCHECK"]
    health = json.loads(last["HEALTHCHECK"].partition("CMD ")[2])
    compile(health[2], "health", "exec")
    assert "ADD" not in kinds and "MAINTAINER" not in kinds
    for step in steps:
        if step["instruction"] == "COPY" and "--from" not in step["value"]:
            for source in step["value"].split()[:-1]:
                assert (ROOT / source).exists(), source
        if step["instruction"] == "RUN":
            assert "curl" not in step["value"] and "sudo" not in step["value"] and "upgrade" not in step["value"]
            if "apt-get" in step["value"]:
                assert "--no-install-recommends" in step["value"] and "rm -rf /var/lib/apt/lists" in step["value"]
            if "pip install" in step["value"]:
                # Everything by its sha256, but torch's CPU build, which PyPI does not have, and the wheel made here.
                taken = re.findall(r"pip install ([^&]*)", step["value"])
                assert f"--no-deps --require-hashes -r serve/cli/requirements/{device}.txt" in step["value"]
                torch = [words for words in taken if "torch==" in words]
                assert len(torch) == (device == "cpu") and all("--no-deps" in words for words in torch)
                others = [words.strip() for words in taken if "--require-hashes" not in words and words not in torch]
                pip = re.search(r"^PIP=(\S+)", (ROOT / "install.sh").read_text(), re.M)[1]
                assert others == [f"pip=={pip}", "--no-deps /dist/loradock-*.whl"]
    assert not re.search(r"KEY|TOKEN|PASSWORD|SECRET", parser.content)


def test_every_image_is_named_in_one_place(compose):
    """docker/.env; `docker build` without the composition takes the same Python."""
    text = COMPOSE.read_text()
    assert set(re.findall(r"image: (\S+)", text)) == {"loradock:cpu", "loradock:gpu"} | {
        f"${{{name}}}" for name in IMAGES if name != "PYTHON_IMAGE"
    }
    for device in ("cpu", "gpu"):
        assert compose["services"][f"loradock-{device}"]["build"]["args"] == {"PYTHON_IMAGE": IMAGES["PYTHON_IMAGE"]}
        assert f"ARG PYTHON_IMAGE={IMAGES['PYTHON_IMAGE']}\n" in (ROOT / f"docker/Dockerfile.{device}").read_text()


def test_the_images_take_the_torch_and_the_pip_that_the_installer_takes():
    installer = (ROOT / "install.sh").read_text()
    pip, torch, vision = (
        re.search(rf"^{name}=([\d.]+)", installer, re.M)[1] for name in ("PIP", "TORCH", "TORCHVISION")
    )
    cpu, gpu = ((ROOT / f"docker/Dockerfile.{device}").read_text() for device in ("cpu", "gpu"))
    assert f"torch=={torch}+cpu torchvision=={vision}+cpu" in cpu
    assert f"pip=={pip}" in cpu and f"pip=={pip}" in gpu
