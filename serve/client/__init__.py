"""Speaks to a running server from outside: the adapter API and OpenAI batch files.

It imports nothing of the server but its errors; `bench` is a load client.
"""
