"""What vLLM's engine and worker import on a CPU; imported once, in the process that they are forked from."""

# ruff: noqa: E402, F401
import gc

from serve.vllm_backend.forkserver import die_with_parent

die_with_parent()
# A third of the time that the imports take would go into looking for garbage in what stays.
gc.disable()

import setproctitle
import transformers.models.auto
import vllm.entrypoints.openai.models.protocol
import vllm.lora.model_manager
import vllm.lora.worker_manager
import vllm.model_executor.model_loader
import vllm.model_executor.models.llama
import vllm.model_executor.models.registry
import vllm.v1.attention.backends.cpu_attn
import vllm.v1.engine.core
import vllm.v1.executor.multiproc_executor
import vllm.v1.worker.cpu_model_runner
import vllm.v1.worker.cpu_worker

gc.enable()
# Before it forks: where a title goes is found through the environment, which each process then replaces.
setproctitle.setproctitle("loradock: fork server")
