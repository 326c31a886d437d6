"""What an inference request passes before an engine sees it: whose it is, what it may ask, which version answers.

It reads and rewrites requests; it decides nothing about versions (`serve.rollout`) and knows no vLLM.
"""
