"""What the server and vLLM's engine and worker import on a CPU; imported once, before one is forked from the other."""

# ruff: noqa: E402, F401
import gc

# A third of the time that the imports take would go into looking for garbage in what stays.
collects = gc.isenabled()
gc.disable()

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

if collects:
    gc.enable()
