"""Tokens by tenant and adapter: the ledger in the registry, and its metrics.

Prices are beside it; limits of a key are `serve.auth`.
"""
