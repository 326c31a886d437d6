"""A login to a registry is found where the tools that write it keep it, for the repository that it is for."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from serve.adapters.sources.registry_login import DOCKER_HUB, Login, login_of

HOST = "registry.example.org"


def auth(user: str, password: str = "secret") -> dict[str, str]:
    return {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}


def write(file: Path, **stated: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(stated))


def user_of(environ: dict[str, str], repository: str = "team/tone", host: str = HOST) -> str | None:
    login = login_of(host, repository, environ)
    return login and login.user


def test_files_are_read_in_their_order(tmp_path):
    environ = {"HOME": str(tmp_path)}
    assert login_of(HOST, "team/tone", environ) is None
    write(tmp_path / ".docker/config.json", auths={HOST: auth("home")})
    assert login_of(HOST, "team/tone", environ) == Login("home", "secret")
    write(tmp_path / "docker/config.json", auths={HOST: auth("docker")})
    environ["DOCKER_CONFIG"] = str(tmp_path / "docker")
    assert user_of(environ) == "docker"
    write(tmp_path / "run/containers/auth.json", auths={"other.example.org": auth("else")})
    environ["XDG_RUNTIME_DIR"] = str(tmp_path / "run")
    assert user_of(environ) == "docker"
    write(tmp_path / "run/containers/auth.json", auths={HOST: auth("podman")})
    assert user_of(environ) == "podman"
    write(tmp_path / "alone.json", auths={})
    environ["REGISTRY_AUTH_FILE"] = str(tmp_path / "alone.json")
    assert user_of(environ) is None


def test_a_login_is_for_what_lies_below_it_and_the_nearest_counts(tmp_path):
    environ = {"REGISTRY_AUTH_FILE": str(tmp_path / "auth.json")}
    write(
        tmp_path / "auth.json",
        auths={f"https://{HOST}/v2/": auth("host"), f"{HOST}/team": auth("team"), f"{HOST}/team/tone": auth("tone")},
    )
    assert [user_of(environ, name) for name in ("team/tone", "team/voice", "teams/x", "x")] == [
        "tone", "team", "host", "host",
    ]  # fmt: skip
    assert user_of(environ, host="registry.example.org:5000") is None
    write(tmp_path / "auth.json", auths={f"{HOST}/team": auth("team")})
    assert user_of(environ, "x") is None


def test_docker_hub_goes_by_the_name_that_docker_writes(tmp_path):
    environ = {"REGISTRY_AUTH_FILE": str(tmp_path / "auth.json")}
    write(tmp_path / "auth.json", auths={DOCKER_HUB: auth("ada")})
    assert user_of(environ, host="registry-1.docker.io") == "ada"


def test_what_is_no_login_is_passed_over(tmp_path):
    environ = {"REGISTRY_AUTH_FILE": str(tmp_path / "auth.json")}
    for entry in ({}, {"auth": "%"}, {"auth": "gA=="}, {"auth": 3}, [], "x", {"password": "alone"}):
        write(tmp_path / "auth.json", auths={HOST: entry})
        assert login_of(HOST, "x", environ) is None, entry
    for auths in ([], "x", None):
        write(tmp_path / "auth.json", auths=auths)
        assert login_of(HOST, "x", environ) is None
    (tmp_path / "auth.json").write_text("[]")
    with pytest.raises(ValueError, match=r"auth\.json with the logins"):
        login_of(HOST, "x", environ)


def test_a_secret_is_in_no_log(tmp_path):
    assert "secret" not in repr(Login("ada", "secret", "secret", "secret"))


@pytest.fixture
def helper(tmp_path, monkeypatch):
    """A program docker-credential-vault, as those of the clouds."""
    program = tmp_path / "bin/docker-credential-vault"
    program.parent.mkdir()
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")

    def write(script: str) -> None:
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)

    return write


def test_a_helper_is_asked_for_its_hosts(tmp_path, helper):
    environ = {"REGISTRY_AUTH_FILE": str(tmp_path / "auth.json")}
    write(tmp_path / "auth.json", auths={HOST: auth("file")}, credHelpers={HOST: "vault"})
    helper('[ "$1" = get ] && read host; echo "{\\"Username\\": \\"$host\\", \\"Secret\\": \\"s\\"}"')
    assert login_of(HOST, "x", environ) == Login(HOST, "s")
    assert user_of(environ, host="other.example.org") is None
    helper('echo "{\\"Username\\": \\"<token>\\", \\"Secret\\": \\"s\\"}"')
    assert login_of(HOST, "x", environ) == Login(identity="s")
    helper("echo credentials not found in native keychain; exit 1")
    assert user_of(environ) == "file"
    write(tmp_path / "auth.json", credsStore="vault")
    assert login_of(HOST, "x", environ) is None


@pytest.mark.parametrize(
    ("name", "says"),
    [("none-such", "not installed"), ("../vault", "name that is none"), ("vault", "gives no login")],
)
def test_a_helper_that_fails_is_a_sentence(tmp_path, helper, name, says):
    helper("echo hello")
    write(tmp_path / "auth.json", credHelpers={HOST: name})
    with pytest.raises(ValueError, match=says):
        login_of(HOST, "x", {"REGISTRY_AUTH_FILE": str(tmp_path / "auth.json")})
