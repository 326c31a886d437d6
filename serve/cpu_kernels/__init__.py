"""Many LoRA adapters on a CPU: C++ kernels, and how they take the place of vLLM's own path.

It runs inside vLLM's processes and imports nothing of ours.
"""
