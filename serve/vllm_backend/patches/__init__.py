"""Functions of vLLM's that are replaced, each entry of a table with what replaces it.

The table itself is `serve.cpu_kernels.patches`; patches for speed on a CPU are beside the kernels.
"""
