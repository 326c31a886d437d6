"""What changes a model: merge, prune, quantize. A package a kind, a module a method.

A step reads one folder and writes another; it knows neither the plan nor the other steps' order.
"""
