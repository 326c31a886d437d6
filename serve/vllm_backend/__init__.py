"""Everything that knows vLLM: its engine, its OpenAI server, its worker, its processes, under our names.

Nothing else imports vllm, except the kernels of `serve.cpu_kernels`, which run inside it.
"""
