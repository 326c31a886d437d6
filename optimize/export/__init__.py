"""Writes a model in another runtime's format: ONNX, onnxruntime-genai.

Hugging Face checkpoints, which vLLM serves, need no export.
"""
