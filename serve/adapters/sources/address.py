"""The address of an adapter, taken apart: no other scheme, no chained URL, no query, no step upwards.

    hf://org/repo[@revision][/folder]           s3://bucket/prefix
    https://host/folder (a configured host)     file:///folder (below a configured root)
    oci://host/repository[:tag|@digest] (a configured host)
    mlflow://models/NAME/VERSION[/folder]       mlflow://models/NAME@ALIAS[/folder]     mlflow://runs/RUN/folder
    wandb-artifact://entity/project/name:alias[/folder]

The last two are read with this server's own credentials. Installed packages may add others (`sources.kind`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from serve.adapters.sources.kind import offered
from serve.errors import BadRequest, Forbidden
from serve.names import shown

TAKEN = (
    "hf://org/repo[@revision][/folder], s3://bucket/prefix, https://host/folder, file:///folder, "
    "oci://host/repository:tag, mlflow://models/NAME/VERSION or wandb-artifact://entity/project/name:alias"
)
# Through them another tenant than `default` would read with the server's credentials.
LENT_TO_NOBODY = ("mlflow", "wandb-artifact")

_HOST = r"[a-z0-9][a-z0-9.-]*(:[0-9]{1,5})?"
_FOLDER = r"(/[\w.=+-]+)*"
_OCI_NAME = r"[a-z0-9]+([._-]+[a-z0-9]+)*"
_FORM = {
    "hf": re.compile(r"(?P<at>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w.-]+)?(/[\w.-]+)*)/?", re.ASCII),
    "s3": re.compile(r"(?P<at>[a-z0-9][a-z0-9.-]{2,62}(/[\w.=+ -]+)*)/?", re.ASCII),
    "https": re.compile(rf"(?P<at>{_HOST}(/[\w.=+~-]+)+)/?", re.ASCII),
    "oci": re.compile(
        rf"(?P<at>{_HOST}/{_OCI_NAME}(/{_OCI_NAME})*(:\w[\w.-]{{0,127}}|@sha256:[0-9a-f]{{64}})?)", re.ASCII
    ),
    "mlflow": re.compile(
        rf"(?P<at>(models/[\w.-]+(/[0-9]{{1,9}}|@[\w.-]+){_FOLDER}|runs/[0-9a-f]{{32}}(/[\w.=+-]+)+))/?", re.ASCII
    ),
    "wandb-artifact": re.compile(rf"(?P<at>[\w.-]+/[\w.-]+/[\w.-]+:[\w.-]+{_FOLDER})/?", re.ASCII),
    "file": re.compile(r"(?P<at>/[^\0]*)"),
}
# hf://datasets/... and hf://spaces/... are other kinds of repositories.
_NOT_MODELS = ("datasets/", "spaces/", "buckets/", "kernels/")
# A path of vLLM's runtime LoRA API that names a repository of the hub.
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Source:
    """A place that was judged: its scheme and the path within it; what of it is read, if that is known by then.

    `version` is that, where an address may move: a hub's commit, an image's digest. `address` is how whoever asked
    spells it, for errors: a folder's real path is none of theirs.
    """

    scheme: str
    path: str
    version: str = ""
    address: str = field(default="", compare=False)
    # The hosts and folders that whoever asked may name.
    hosts: frozenset[str] = field(default=frozenset(), compare=False)
    roots: tuple[Path, ...] = field(default=(), compare=False)

    @property
    def read(self) -> str:
        """What was read, for people."""
        what = f"commit {self.version}" if self.scheme == "hf" else self.version
        return f"{self.address} ({what})" if self.version else self.address

    @property
    def shown(self) -> str:
        return shown(self.address or f"{self.scheme}://{self.path}")


def address_of(path: str) -> str:
    """What vLLM calls a LoRA path, as an address: a folder, ORG/REPO of the hub, or an address already."""
    if "://" in path:
        return path
    if path.startswith("/"):
        return f"file://{path}"
    if _HUB_NAME.fullmatch(path):
        return f"hf://{path}"
    raise BadRequest(
        f"`{shown(path)}` is no path that this server takes: send a folder's absolute path, org/repo or {taken()}"
    )


def taken() -> str:
    """What is taken, for errors."""
    return ", ".join([TAKEN, *(kind.example for kind in offered().values())])


def parse(source: str, roots: Iterable[Path] = (), hosts: Iterable[str] = (), *, trusted: bool = True) -> Source:
    """The place that `source` names; a folder of this machine must lie in one of `roots`, a host be one of `hosts`.

    Who is not `trusted` may not name what is read with this server's credentials alone.
    """
    scheme, there, path = source.partition("://")
    more = None if scheme in _FORM else offered().get(scheme)
    pattern = more.form if more else _FORM.get(scheme)
    if not there or pattern is None:
        raise BadRequest(f"source `{shown(source)}` is not taken; this server fetches {taken()}", param="source")
    form = pattern.fullmatch(path)
    steps = path.split("@")[0].split("/") + path.split("/")
    if form is None or ".." in steps or "." in steps or (scheme == "hf" and path.startswith(_NOT_MODELS)):
        raise BadRequest(f"source `{shown(source)}` cannot be read; this server fetches {taken()}", param="source")
    named = frozenset(host.lower() for host in hosts)
    if scheme in ("https", "oci") and form["at"].partition("/")[0] not in named:
        raise BadRequest(
            f"source `{shown(source)}` is on none of the source_hosts that this key may name; "
            "push the files, or have the host added (LORADOCK_SOURCE_HOSTS; for tenant default alone)",
            param="source",
        )
    lent = scheme in LENT_TO_NOBODY or (more is not None and not more.public)
    if lent and not trusted:
        raise BadRequest(
            f"source `{shown(source)}` is read with this server's credentials, for tenant default alone; "
            "push the files",
            param="source",
        )
    place = Source(scheme, form["at"], address=source, hosts=named, roots=tuple(roots))
    return place if scheme != "file" else folder_of(place)


def folder_of(place: Source) -> Source:
    """The folder of this machine that is named; judged where links lead, and opened there."""
    real = Path(os.path.realpath(place.path))
    if not any(real.is_relative_to(Path(os.path.realpath(root))) for root in place.roots):
        raise Forbidden(
            f"source `{place.shown}` lies in none of the source_roots that this key may name; "
            "push the files, or have its folder added (LORADOCK_SOURCE_ROOTS; for tenant default alone)"
        )
    return Source("file", str(real), address=place.address, roots=place.roots)
