"""Serve one or more base models with many hot-swapped LoRA adapters."""

__version__ = "0.1.0"
