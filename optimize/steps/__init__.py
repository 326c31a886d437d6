"""What changes a model: merge, prune, quantize. One package per kind, one module per method.

A step reads one folder and writes another; it knows neither the plan nor the order of the steps.
"""
