"""A checkpoint on disk and as a torch model: tensors, formats, KV cache scales, folders that appear whole.

No step and no recipe lives here.
"""
