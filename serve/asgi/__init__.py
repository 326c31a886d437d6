"""ASGI pieces between an answer and its socket: the observed exchange, pacing, the fast stream, cancellation.

They know no tenants, no adapters and no engine.
"""
