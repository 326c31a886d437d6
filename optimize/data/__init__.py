"""The text that a run calibrates, trains and evaluates on.

It reads and splits text; it knows no model.
"""
