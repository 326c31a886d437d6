"""LoRA adapters trained on examples, by their answers or by which of two is better, and what that did to the base.

The loop is ours and the adapter is PEFT's; nothing here changes the base.
"""
