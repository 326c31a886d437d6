"""A campaign that computes with the libraries and threads that an engine has."""

from __future__ import annotations

import os
import sys


def begin_anew() -> None:
    """Begin this process anew over the libraries that engines preload, unless it is over them already."""
    from serve.models.hardware import cpu_environment

    wanted = cpu_environment(os.environ, together=True)
    if wanted.get("LD_PRELOAD", "") != os.environ.get("LD_PRELOAD", ""):
        os.environ.update(wanted)
        os.execv(sys.executable, sys.orig_argv)
