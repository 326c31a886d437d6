"""Speaks to a running server from outside: the adapter API, OpenAI batch files, the load harness (`bench`).

It imports nothing of the server but its errors.
"""
