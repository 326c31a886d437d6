"""Adapters that keep themselves good: what drifted is trained again, proved, tried and promoted, step after step.

It asks fine-tuning, golden sets, canaries and the lifecycle for each step. Nothing below imports it.
"""
