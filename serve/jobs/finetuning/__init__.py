"""OpenAI's fine-tuning jobs: examples in a file become a version of an adapter, trained behind every client.

What trains is a program of its own over a folder; nothing here knows tensors, and `optimize` is never imported.
"""
