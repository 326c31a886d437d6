"""From an empty directory and a Python: install the wheel, serve, chat, push, in four commands; then all the rest.

    python -m tests.campaigns.wheel [--log FILE]

The environment is a fresh one, and nothing of the repository is within its reach. pip finds torch's CPU build where it
is set up to look (PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL), else in PyTorch's index. Takes 5 GB of disk.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

from tests.support import distribution
from tests.support.lora import trained
from tests.support.newcomer import Terminal, chat, content
from tests.support.server import free_port

TORCH = "--extra-index-url https://download.pytorch.org/whl/cpu"
RECIPE = "model: smollm2\nsteps:\n  - quantize: {scheme: w8a8, method: rtn}\nevaluate: {samples: 4}\noutput: ./small\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--log", type=Path, help="where the log goes, too")
    log = parser.parse_args().log
    folder = Path(tempfile.mkdtemp(prefix="loradock-wheel-"))
    try:
        terminal = prepared(folder)
        run(terminal)
        if log:
            log.write_text("\n".join(terminal.lines) + "\n")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def prepared(folder: Path) -> Terminal:
    """An empty folder with the wheel and an adapter in it, and an environment of somebody who has only Python."""
    empty = folder / "empty"
    empty.mkdir()
    wheel = distribution.build("wheel", distribution.copy(folder / "source"), folder / "dist")
    shutil.copy(wheel, empty)
    shutil.copytree(trained("alpha")["alpha"], empty / "my-adapter")
    shutil.rmtree(folder / "source")
    kept = {key: value for key, value in os.environ.items() if key.startswith(("PIP_", "SSL_", "http", "HTTP"))}
    places = {"XDG_CACHE_HOME": str(folder / "cache"), "XDG_DATA_HOME": str(folder / "data")}
    pip_cache = {"PIP_CACHE_DIR": os.environ.get("PIP_CACHE_DIR", str(Path.home() / ".cache/pip"))}
    environ = {**pip_cache, **kept, **places, "PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(folder)}
    return Terminal(empty, environ, {str(folder): "/tmp/x"})


def run(terminal: Terminal) -> None:
    python = Path(sys.base_prefix, "bin", f"python3.{sys.version_info.minor}")
    (wheel,) = terminal.folder.glob("*.whl")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    terminal.environ["LORADOCK_URL"] = url
    elsewhere = {"PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"} & terminal.environ.keys()
    index = "" if elsewhere else f" {TORCH}"
    terminal.type(f"{python} -m venv env && env/bin/pip install --quiet '{wheel.name}[cpu]'{index}")
    loradock = str(terminal.folder / "env/bin/loradock")
    with terminal.serving([loradock, "serve", "--port", str(port)], url):
        assert "Paris" in content(terminal.type(chat("smollm2", url)))
        terminal.type("env/bin/loradock adapters push tone ./my-adapter")
        assert "alpha alpha" in content(terminal.type(chat("tone", url)))
        page = terminal.type(f"curl -s {url}/dashboard | head -c 15; curl -sf {url}/dashboard/icon.svg | head -c 4")
        assert "<!doctype" in page.lower() and "<svg" in page
    terminal.type("env/bin/loradock --version")
    terminal.type("env/bin/loradock doctor", lines=40)
    terminal.type("env/bin/loradock monitoring render --out monitoring", lines=20)
    # As it would be installed for good: the tested versions, and their hashes.
    terminal.type("env/bin/loradock requirements cpu --extra optimize > tested.txt && wc -l tested.txt")
    terminal.type("env/bin/pip install --quiet --no-deps --require-hashes -r tested.txt")
    (terminal.folder / "recipe.yaml").write_text(RECIPE)
    terminal.type("env/bin/loradock optimize recipe.yaml", lines=8)
    with terminal.serving([loradock, "serve", "./small", "--port", str(port)], url):
        assert "Paris" in content(terminal.type(chat("small", url)))
    terminal.type("du -sh env | cut -f1")
    left = sorted(file.name for file in terminal.folder.iterdir())
    terminal.note(f"files here now: {', '.join(left)}")


if __name__ == "__main__":
    main()
