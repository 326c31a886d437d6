"""GPTAQ with AWQ's scales of channels."""

from __future__ import annotations

from optimize.steps.quantize.method import Method
from optimize.steps.quantize.methods import awq, gptq

METHOD = Method("awq-gptq", gptq.round_, awq.scales, follows=True)
