"""Fewer layers, neurons, weights or tokens, and healing what that cost.

What is rounded lives in `optimize.steps.quantize`.
"""
