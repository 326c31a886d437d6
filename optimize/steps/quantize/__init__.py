"""Fewer bits a weight: rounding, calibration, mixed precision.

How rounded layers lie on disk is `optimize.checkpoint.formats`.
"""
