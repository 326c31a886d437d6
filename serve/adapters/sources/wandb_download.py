"""A program: brings an adapter from Weights & Biases, through their own client. See `client_process` for what it says.

It imports nothing of loradock. Where the service is, and the key to it, are their own variables.
"""

import json
import os
import resource
from pathlib import Path
from typing import Any

SETTINGS = {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false", "WANDB_DISABLE_GIT": "true"}
FOLDERS = ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR")


def main() -> None:
    # What a library prints is no answer; and the client's own service inherits neither pipe.
    lines, out = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)

    def say(**answer: Any) -> None:
        print(json.dumps(answer), file=out, flush=True)

    asked = json.loads(lines.readline())
    folder = Path(asked["folder"])
    # It keeps nothing outside of the folder that goes with the push.
    os.environ.update({**SETTINGS, **dict.fromkeys(FOLDERS, str(folder / "wandb"))})
    resource.setrlimit(resource.RLIMIT_FSIZE, (asked["max_bytes"], asked["max_bytes"]))
    try:
        if not os.environ.get("WANDB_API_KEY"):
            say(error="refused", text="needs a key: set WANDB_API_KEY where this server starts")
            return
        import wandb

        entity, project, name, *below = asked["path"].split("/")
        artifact = wandb.Api(timeout=30).artifact(f"{entity}/{project}/{name}")
        say(place="https://", host="", version=artifact.version)
        _download(artifact, "/".join(below), folder, json.loads(lines.readline())["names"], asked["max_bytes"])
        say(done=True)
    except ImportError as missing:
        say(error="missing package", text=missing.name or "")
    except _Refused as refused:
        say(error=refused.kind, text=str(refused))
    except Exception as failed:
        say(error=_kind(failed), text=f"{type(failed).__name__}: {failed}")


class _Refused(Exception):
    def __init__(self, kind: str, text: str = "") -> None:
        super().__init__(text)
        self.kind = kind


def _download(artifact: Any, below: str, folder: Path, names: list[str], max_bytes: int) -> None:
    entries = artifact.manifest.entries
    paths = {name: f"{below}/{name}" if below else name for name in names}
    # Those of the manifest do not know where they are downloaded from.
    wanted = {name: artifact.get_entry(path) for name, path in paths.items() if path in entries}
    for name, entry in wanted.items():
        # Whoever writes to the project chooses where a reference leads.
        if entry.ref is not None:
            raise _Refused("refused", f"has {name} as a reference to {str(entry.ref)[:100]}: log the file itself")
    if sum(entry.size or 0 for entry in wanted.values()) > max_bytes:
        raise _Refused("large")
    for name, entry in wanted.items():
        os.replace(entry.download(root=str(folder / "wandb"), skip_cache=True), folder / name)


def _kind(error: Exception) -> str:
    text = str(error).lower()
    name = type(error).__name__
    if any(word in text for word in ("401", "403", "permission", "api key")) or name == "AuthenticationError":
        return "forbidden"
    if isinstance(error, ValueError) or "not found" in text or "404" in text:
        return "absent"
    return "large" if isinstance(error, OSError) and error.errno == 27 else "failed"


if __name__ == "__main__":
    main()
