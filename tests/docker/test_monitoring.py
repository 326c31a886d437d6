"""`make monitoring` runs what it says, and leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from tests.support.server import alive, descendants, free_port
from tests.support.waiting import eventually

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "docker/monitoring.sh"

pytestmark = pytest.mark.skipif(not (ROOT / ".venv/bin/loradock").exists(), reason="not set up by `make test`")


def ready(address: str) -> bool:
    with suppress(httpx.TransportError):
        return httpx.get(f"http://{address}/-/ready", timeout=5).status_code == 200
    return False


@pytest.mark.skipif(not shutil.which("prometheus-alertmanager"), reason="prometheus-alertmanager is not installed")
def test_it_starts_both_and_takes_both_with_it(tmp_path):
    server, prometheus, alertmanager = (f"127.0.0.1:{free_port()}" for _ in range(3))
    told = {"SERVER": server, "PROMETHEUS": prometheus, "ALERTMANAGER": alertmanager, "OUT": str(tmp_path)}
    plain = {name: value for name, value in os.environ.items() if not name.startswith("LORADOCK_")}
    environ = {**plain, "PYTHONPATH": str(ROOT), "LORADOCK_KEY": "a-key", **told}
    script = subprocess.Popen([SCRIPT], env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert eventually(lambda: (ready(prometheus) and ready(alertmanager)) or script.poll() is not None)
        assert script.poll() is None, script.communicate()[0]
        family = descendants(script.pid)
        loaded = httpx.get(f"http://{prometheus}/api/v1/status/config", timeout=60).json()["data"]["yaml"]
        assert server in loaded and alertmanager in loaded
        for key in ("prometheus/scrape-key", "alertmanager/alert-key"):
            assert (tmp_path / key).read_text() == "a-key"
            assert not (tmp_path / key).stat().st_mode & 0o077
    finally:
        script.send_signal(signal.SIGTERM)
        output, _ = script.communicate(timeout=30)
    assert script.returncode == 0, output
    assert not alive(family)


def test_without_prometheus_it_says_what_to_install(tmp_path):
    for program in ("bash", "dirname"):
        (tmp_path / program).symlink_to(shutil.which(program))
    asked = subprocess.run([SCRIPT], env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert asked.returncode == 1
    assert "prometheus is not installed" in asked.stderr and "apt-get install" in asked.stderr
