"""What runs first: a server begins anew over the libraries that it needs, before it has imported the commands."""

from __future__ import annotations

import sys

from serve.server import preloaded


def main() -> None:
    preloaded.ensure(sys.argv[1:])
    from serve.cli.main import main as command

    command()
