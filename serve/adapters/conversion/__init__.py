"""Adapters of other kinds than LoRA become LoRA when they are pushed.

Here live the kinds that are taken, the process that converts one, and what it measures.
"""
