"""Others' weights, read and written: Hugging Face checkpoints."""
