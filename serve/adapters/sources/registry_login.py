"""Logins to registries of container images, where `docker login`, `podman login` and `oras login` keep them.

    $REGISTRY_AUTH_FILE, alone      else $XDG_RUNTIME_DIR/containers/auth.json      then $DOCKER_CONFIG/config.json

A file is read for each fetch, because whoever keeps it (a Secret, a cloud's helper) changes it. Spelled as in
containers-auth.json(5) and in Docker's configuration.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# What `docker login` without a host writes, and what its registry is called otherwise.
DOCKER_HUB = "https://index.docker.io/v1/"
_OF_DOCKER_HUB = ("docker.io", "index.docker.io", "registry-1.docker.io")
_HELPER = re.compile(r"[\w.-]+", re.ASCII)
_HELPER_SECONDS = 30.0
_IDENTITY = "<token>"  # the user whose secret is a token, in what a helper says
_LARGEST = 1 << 20


@dataclass(frozen=True, slots=True)
class Login:
    """A user with a password, or with an identity token that is given for others, or a token for the registry."""

    user: str = ""
    password: str = field(default="", repr=False)
    identity: str = field(default="", repr=False)
    token: str = field(default="", repr=False)

    @property
    def basic(self) -> str:
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()


def login_of(host: str, repository: str, environ: Mapping[str, str] = os.environ) -> Login | None:
    """The login for a repository; OSError or ValueError where what should say it cannot be read."""
    for file in _files(environ):
        try:
            with file.open("rb") as opened:
                text = opened.read(_LARGEST + 1)
        except (FileNotFoundError, NotADirectoryError):
            continue
        try:
            stated = json.loads(text)
        except (ValueError, RecursionError):
            stated = None
        if not isinstance(stated, dict):
            raise ValueError(f"{file.name} with the logins to registries is no JSON object")
        if login := _in(stated, host, repository):
            return login
    return None


def _files(environ: Mapping[str, str]) -> Iterator[Path]:
    if alone := environ.get("REGISTRY_AUTH_FILE"):
        yield Path(alone)
        return
    if run := environ.get("XDG_RUNTIME_DIR"):
        yield Path(run, "containers/auth.json")
    docker = environ.get("DOCKER_CONFIG") or str(Path(environ.get("HOME") or Path.home(), ".docker"))
    yield Path(docker, "config.json")


def _in(stated: Mapping[str, Any], host: str, repository: str) -> Login | None:
    key = DOCKER_HUB if host in _OF_DOCKER_HUB else host
    helper = _mapping(stated, "credHelpers").get(host) or stated.get("credsStore")
    if isinstance(helper, str) and helper and (login := _of_helper(helper, key)):
        return login
    entries = _mapping(stated, "auths")
    for name in _names(host, repository):
        for place, entry in entries.items():
            if isinstance(entry, dict) and _spelled(place) == name and (login := _of_entry(entry)):
                return login
    return None


def _mapping(stated: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = stated.get(name)
    return value if isinstance(value, dict) else {}


def _names(host: str, repository: str) -> Iterator[str]:
    """A repository's own login before that of a folder above it, and the host's last."""
    steps = [host, *repository.split("/")]
    for count in range(len(steps), 0, -1):
        yield "/".join(steps[:count])
    if host in _OF_DOCKER_HUB:
        yield from (name for name in _OF_DOCKER_HUB if name != host)


def _spelled(place: str) -> str:
    """An entry's name without what Docker wrote around a host once: https://HOST/v1/."""
    name = place.partition("://")[2] or place
    return re.sub(r"/(v[12]/?)?$", "", name)


def _of_entry(entry: Mapping[str, Any]) -> Login | None:
    words = {name: value for name, value in entry.items() if isinstance(value, str)}
    try:
        user, _, password = base64.b64decode(words.get("auth", ""), validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        user, password = "", ""
    login = Login(
        words.get("username") or user,
        words.get("password") or password.rstrip("\0"),
        words.get("identitytoken", ""),
        words.get("registrytoken", ""),
    )
    return login if login.user or login.identity or login.token else None


def _of_helper(helper: str, key: str) -> Login | None:
    """What `docker-credential-HELPER get` says; it ends with another code than 0 where it knows nothing."""
    if not _HELPER.fullmatch(helper):
        raise ValueError("the helper for logins to registries has a name that is none")
    try:
        done = subprocess.run(
            [f"docker-credential-{helper}", "get"],
            input=key.encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_HELPER_SECONDS,
            check=False,
        )
    except FileNotFoundError:
        raise ValueError(
            f"docker-credential-{helper}, which keeps the logins to registries, is not installed"
        ) from None
    except subprocess.TimeoutExpired:
        raise ValueError(f"docker-credential-{helper} does not answer") from None
    if done.returncode:
        return None
    try:
        said = json.loads(done.stdout)
        user, secret = str(said["Username"]), str(said["Secret"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"docker-credential-{helper} gives no login") from None
    return Login(identity=secret) if user == _IDENTITY else Login(user, secret)
