"""Fewer layers, neurons, weights or tokens, and healing the damage.

Rounding weights lives in `optimize.steps.quantize`.
"""
