"""Forks servers over the fake backend, so that one can be killed and the next is there in a tenth of a second.

    python -m tests.support.zygote DATA_DIR MODEL_DIR PORT

A line on standard input starts a server; its process id comes back as a line, and then its end as another.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import uvicorn

from serve.api.app import build_app
from serve.config import load
from serve.models.lora_modules import lora_modules
from tests.support.backend import FakeBackend


def main(data: Path, model: str, port: str) -> None:
    lora_modules(model)  # the imports that take seconds happen here, once
    for _ in sys.stdin:
        child = os.fork()
        if child == 0:
            config = load([model, "--name", "base", "--data-dir", str(data), "--port", port], {})
            uvicorn.run(build_app(config, FakeBackend(config.model)), port=config.port, log_level="error")  # type: ignore[arg-type]
            os._exit(0)
        print(child, flush=True)
        os.waitpid(child, 0)
        print("ended", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
