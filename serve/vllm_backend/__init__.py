"""Everything that knows vLLM: its engine, its OpenAI server, its worker, its processes, under our names.

Nothing else imports vllm, except the kernels of `serve.cpu_kernels`, which run inside it.
"""

from serve.models import audio_packages

# Before any module here imports vLLM, and with it transformers, whichever process this is.
audio_packages.hide()
