"""OpenAI's files and batches: requests in a file, answered behind every client, and the answers in a file.

What answers a line is the gateway's own way to an engine; nothing here chooses a version or keeps an adapter.
"""
