"""Adapters at rest: inspection, upload, fetch, the store of bytes, the registry of names and versions, backup.

Nothing here is about traffic or engines.
"""
