"""Several adapters in one answer: what names them, their stacked bytes, and the folders of those.

A weighted sum of LoRAs is one LoRA whose rank is the sum of theirs.
"""
