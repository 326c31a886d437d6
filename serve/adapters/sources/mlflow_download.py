"""A program: brings an adapter from MLflow, through MLflow's own client. See `client_process` for what it says.

It imports nothing of loradock. Where the tracking server is, and the key to it, are MLflow's own variables.
"""

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

# No redirect nor URL to elsewhere, no word to anybody, and no hour of attempts.
SETTINGS = {
    "MLFLOW_ALLOW_HTTP_REDIRECTS": "false",
    "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
HOPS = 4


def main() -> None:
    lines = sys.stdin
    out, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no answer

    def say(**answer: Any) -> None:
        print(json.dumps(answer), file=out, flush=True)

    os.environ.update(SETTINGS)
    asked = json.loads(lines.readline())
    resource.setrlimit(resource.RLIMIT_FSIZE, (asked["max_bytes"], asked["max_bytes"]))
    try:
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            say(error="refused", text="is asked of no server: set MLFLOW_TRACKING_URI where this server starts")
            return
        place, version = _resolve(asked["path"])
        say(place=place, version=version, host=urlsplit(os.environ["MLFLOW_TRACKING_URI"]).netloc.rpartition("@")[2])
        names = json.loads(lines.readline())["names"]
        _download(place, Path(asked["folder"]), names, asked["max_bytes"])
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


def _resolve(path: str) -> tuple[str, str]:
    """Where the files are, and which version of the model or which run that is."""
    from mlflow import MlflowClient

    client = MlflowClient()
    kind, _, rest = path.partition("/")
    name, _, folder = rest.partition("/")
    if kind == "runs":
        return _settled(client, f"runs:/{name}", folder), name
    name, at, alias = name.partition("@")
    if at:
        number = str(client.get_model_version_by_alias(name, alias).version)
    else:
        number, _, folder = folder.partition("/")
    return _settled(client, client.get_model_version_download_uri(name, number), folder), number


def _settled(client: Any, place: str, folder: str) -> str:
    """The place behind MLflow's own names for it, whose scheme says where it is."""
    for _ in range(HOPS):
        place = f"{place.rstrip('/')}/{folder}" if folder else place
        scheme, _, rest = place.partition(":")
        name, _, folder = rest.lstrip("/").partition("/")
        if scheme == "runs":
            place = client.get_run(name).info.artifact_uri
        elif scheme == "models" and name.startswith("m-"):
            place = client.get_logged_model(name).artifact_location
        elif scheme == "models":
            number, _, folder = folder.partition("/")
            place = client.get_model_version_download_uri(name, number)
        else:
            return place
    raise _Refused("refused", "leads from one name to the next without an end")


def _download(place: str, folder: Path, names: list[str], max_bytes: int) -> None:
    from mlflow.artifacts import download_artifacts, list_artifacts

    listed = {Path(entry.path).name: entry for entry in list_artifacts(artifact_uri=place) if not entry.is_dir}
    wanted = [listed[name] for name in names if name in listed]
    if sum(entry.file_size or 0 for entry in wanted) > max_bytes:
        raise _Refused("large")
    for entry in wanted:
        name = Path(entry.path).name
        came = Path(download_artifacts(artifact_uri=f"{place.rstrip('/')}/{name}", dst_path=str(folder)))
        if came != folder / name:
            os.replace(came, folder / name)


def _kind(error: Exception) -> str:
    code = getattr(error, "error_code", "")
    if code in ("RESOURCE_DOES_NOT_EXIST", "ENDPOINT_NOT_FOUND", "NOT_FOUND") or isinstance(error, FileNotFoundError):
        return "absent"
    if code in ("PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"):
        return "forbidden"
    return "large" if isinstance(error, OSError) and error.errno == 27 else "failed"


if __name__ == "__main__":
    main()
