"""Models in GGUF files (Ollama, LM Studio, llama.cpp), made into checkpoints that engines serve.

file: what lies in it, checked first > conversion: families, tokenizer, weights > checkpoint: in the cache
"""
