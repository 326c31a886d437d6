"""What passes between an answer and its socket: the exchange that is observed, the fast stream, cancellation.

Pieces of ASGI alone: no tenants, no adapters, no engine.
"""
