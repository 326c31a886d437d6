"""What adapters are trained on: examples out of captured traffic, and how much came from where.

Whether a job is begun with it, and what becomes of the result, is decided above.
"""
