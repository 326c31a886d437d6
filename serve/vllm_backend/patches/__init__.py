"""What is changed in vLLM: `table` lists every function that is replaced, `applying` puts the replacements in place.

Replacements for speed on a CPU are beside the kernels; nothing here decides anything about requests.
"""
