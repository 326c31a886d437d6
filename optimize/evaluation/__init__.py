"""Measures a result: perplexity, divergence, task scores, and speed in the engine that will serve it.

It measures and judges nothing; the gate is `optimize.pipeline.gate`.
"""
