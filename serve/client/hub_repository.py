"""An adapter's folder into a repository of a hub, as one commit, through the hub's own client.

Who may write is the client's to know: HF_TOKEN, or the login that it keeps. HF_ENDPOINT is another hub.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from serve.client.adapter_client import CARD, MANIFEST, adapter_files
from serve.client.api_client import Refused, Unreachable
from serve.errors import ConfigError, Forbidden, LoradockError, NotFound

_DESTINATION = re.compile(
    r"hf://(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<branch>[\w.-]+))?(?P<folder>(/[\w.-]+)*)/?",
    re.ASCII,
)
# What a hub takes as the name of a model or a data set.
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def publish(folder: Path, destination: str, *, private: bool = False, message: str = "") -> dict[str, Any]:
    """Commit the adapter's files to hf://org/repo[@branch][/folder]; the repository is made if it is not there.

    A README.md that is there already stays, unless the folder has one of its own.
    """
    place = check_destination(destination)
    files = adapter_files(folder)
    repository, branch = place["repository"], place["branch"] or "main"
    below = place["folder"].removeprefix("/")
    with _translated(repository):
        from huggingface_hub import CommitOperationAdd, HfApi

        hub = HfApi()
        hub.create_repo(repository, private=private or None, exist_ok=True)
        if branch != "main":
            hub.create_branch(repository, branch=branch, exist_ok=True)
        contents: dict[str, Any] = {_in(below, file.name): str(file) for file in files}
        if (card := _in(below, CARD)) not in contents and not hub.file_exists(repository, card, revision=branch):
            contents[card] = _card(folder, repository).encode()
        commit = hub.create_commit(
            repository,
            [CommitOperationAdd(name, content) for name, content in contents.items()],
            commit_message=message or f"Adapter {_said(folder).get('name') or folder.name}",
            revision=branch,
        )
    return {
        "object": "adapter.published",
        "repository": repository,
        "branch": branch,
        "commit": commit.oid,
        "url": commit.commit_url,
        "files": [*contents],
    }


def check_destination(destination: str) -> re.Match[str]:
    """Its parts; ConfigError for what is no place in a hub."""
    place = _DESTINATION.fullmatch(destination)
    if place is None or {".", ".."} & {*destination.split("/")}:
        raise ConfigError(f"{destination!r} is no repository of a hub: give hf://org/repo[@branch][/folder]")
    return place


def _in(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _said(folder: Path) -> Mapping[str, Any]:
    try:
        said = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def _card(folder: Path, repository: str) -> str:
    """A model card of what is known; the hub refuses one whose base or data it cannot find by its name."""
    said = _said(folder)
    stated = said.get("provenance")
    stated = stated if isinstance(stated, dict) else {}
    front: dict[str, Any] = {"library_name": "peft", "tags": ["lora"]}
    if _ID.fullmatch(str(stated.get("base_model"))):
        front["base_model"] = stated["base_model"]
    if datasets := [name for name in stated.get("datasets") or [] if _ID.fullmatch(str(name))]:
        front["datasets"] = datasets
    front |= {field: stated[field] for field in ("license", "trained_by") if isinstance(stated.get(field), str)}
    title = said.get("name") or repository.partition("/")[2]
    about = (
        f"A LoRA adapter: version {said['version']}, digest {said['digest']}."
        if "digest" in said
        else "A LoRA adapter."
    )
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n\n# {title}\n\n{about}\n"


@contextmanager
def _translated(repository: str) -> Iterator[None]:
    """The hub's errors, under our names."""
    try:
        yield
    except LoradockError:
        raise
    except ImportError as missing:
        raise ConfigError(
            "huggingface_hub is not installed: `pip install huggingface_hub`, then try again"
        ) from missing
    except Exception as failed:  # the client has dozens, by what the hub answered
        status = getattr(getattr(failed, "response", None), "status_code", None)
        reason = (str(failed).strip().splitlines() or [type(failed).__name__])[0][:300]
        if status in (401, 403) or type(failed).__name__ == "LocalTokenNotFoundError":
            raise Forbidden(
                f"the hub lets nobody write to {repository} without a token that may: set HF_TOKEN ({reason})"
            ) from failed
        if status == 404:
            raise NotFound(f"the hub knows no {repository}, or not for this token ({reason})") from failed
        if status is not None:
            raise Refused(f"the hub did not take the commit ({reason})") from failed
        raise Unreachable(f"the hub did not answer ({reason})") from failed
