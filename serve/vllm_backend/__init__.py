"""All that knows vLLM: its engine, its OpenAI server, its worker, its processes, under our names.

Nobody else imports vllm (the kernels of `serve.cpu_kernels` run inside it).
"""
