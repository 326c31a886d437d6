"""vLLM looks at a model's class in a process of its own, the first time that a machine serves it.

That process imports transformers before it loads a plugin, so the audio packages that cannot be imported are in its
way. Run as a program, this module is that process without them: they are hidden as its package is imported.
"""

from __future__ import annotations

import sys

from serve.models import audio_packages


def install() -> None:
    """Have this module run in the place of vLLM's own (vLLM 0.32: `registry._SUBPROCESS_COMMAND`), if it has to."""
    if audio_packages.unusable():
        from vllm.model_executor.models import registry

        registry._SUBPROCESS_COMMAND = [sys.executable, "-m", __name__]


if __name__ == "__main__":
    from vllm.model_executor.models.registry import _run

    _run()
