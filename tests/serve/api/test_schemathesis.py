"""Schemathesis tries what the OpenAPI document says: no server error, no undocumented answer, no open door."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.described import KEY
from tests.support.server import free_port

PROGRAM = shutil.which("schemathesis", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
pytestmark = [
    pytest.mark.skipif(PROGRAM is None, reason="schemathesis is not installed"),
    pytest.mark.timeout(600),
]
# What a schema cannot say is refused in a sentence: valid data need not be accepted.
NOT_OURS = "positive_data_acceptance"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    port = free_port()
    process = [sys.executable, "-m", "tests.support.described", str(port)]
    with subprocess.Popen(process, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stdout.readline().strip() == "ready"
        yield f"http://127.0.0.1:{port}"
        server.terminate()


def test_the_document_is_true_of_our_own_routes(url: str, tmp_path: Path) -> None:
    # Nothing here sends a zip, and what other cases ask for stays.
    words = ["--exclude-tag", "inference", "--exclude-method", "DELETE", "--exclude-checks", NOT_OURS]
    words += ["--exclude-path", "/v1/adapters/{name}/baseline"]
    command = [str(PROGRAM), "--no-color", "run", f"{url}/openapi.json", "-H", f"Authorization: Bearer {KEY}"]
    options = ["--phases", "coverage", "--seed", "1", "--continue-on-failure", "--no-shrink", *words]
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [*command, *options], cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stdout[-20_000:]
