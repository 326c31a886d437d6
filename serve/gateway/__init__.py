"""What an inference request passes before an engine: authentication, limits, rewriting, routing to a version.

It reads and rewrites requests; it decides nothing about versions (`serve.rollout`) and knows no vLLM.
"""
