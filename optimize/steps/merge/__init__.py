"""Adapters into the base, or into one another.

Exact sums in fp32; no training.
"""
