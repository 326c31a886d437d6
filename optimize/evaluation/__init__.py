"""What a result is worth: perplexity, divergence, task scores, and the engine that will serve it.

It measures and judges nothing; the gate is `optimize.pipeline.gate`.
"""
