"""The base model and the machine: where the model is, what it holds, what memory it needs, what the machine has.

Nothing here starts an engine or knows an adapter.
"""
