"""Of `serve.vllm_backend.preload`, what ends the fork server with its server; without vLLM, which takes seconds."""

from serve.vllm_backend.forkserver import die_with_parent

die_with_parent()
