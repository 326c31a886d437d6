"""The base model on this machine: where it is, what it holds, what it needs, and what the machine has.

Nothing here starts an engine or knows an adapter.
"""
