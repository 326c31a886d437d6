"""Turn a base model and its LoRA adapters into optimized, measured exports."""
