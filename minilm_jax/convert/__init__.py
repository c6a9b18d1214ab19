"""Checkpoints in and out: Hugging Face folders, PyTorch and Flax files, strict both ways."""
