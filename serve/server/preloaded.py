"""The server runs over the libraries that vLLM's processes preload, so that these can be forked from it.

What both import is then in memory once. A library is preloaded when a process begins: this one begins anew, once,
before it has done anything.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from serve.models import hardware

# Set across the new beginning, which would not end where LD_PRELOAD is taken away: by the kernel from a program with
# capabilities, or by a wrapper of Python.
BEGUN = "LORADOCK_PRELOADED"


def ensure(
    words: Sequence[str],
    original: Sequence[str] = tuple(sys.orig_argv),
    execute: Callable[[str, list[str]], object] = os.execv,
) -> None:
    """Begin anew if this is a server, of which `words` are the arguments, on a CPU whose libraries are not preloaded.

    `original` is the whole command line, Python's own part included.
    """
    begun = os.environ.pop(BEGUN, "")
    words = list(words)
    if words[:1] != ["serve"] or list(original[-len(words) :]) != words or not hardware.on_cpu():
        return
    wanted = hardware.cpu_environment(os.environ, together=False).get("LD_PRELOAD")
    if begun or wanted is None or wanted == os.environ.get("LD_PRELOAD"):
        return
    os.environ |= {"LD_PRELOAD": wanted, BEGUN: "1"}
    try:
        execute(sys.executable, [sys.executable, *original[1:]])
    except OSError as error:
        del os.environ[BEGUN]
        why = f"{sys.executable or 'Python'} cannot be executed again ({error.strerror})"
        print(f"loradock: {why}: engines import vLLM by themselves, which takes more memory", file=sys.stderr)
