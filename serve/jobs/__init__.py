"""Work that outlives a request: OpenAI's batches and fine-tuning jobs, over one way of claiming it.

It asks engines by the gateway's own way; what becomes of a trained version is decided in `serve.rollout`.
"""
