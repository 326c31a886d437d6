"""The engines that serve: supervision, base swaps, the fair queue, admission, adapter residency, effect probes.

It drives any backend with the methods of `engine.Backend`; it knows no HTTP and no vLLM.
"""
