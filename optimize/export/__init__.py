"""A model in another runtime's form: ONNX, onnxruntime-genai.

Hugging Face checkpoints, which vLLM serves, need no export.
"""
