"""The Transformer encoder itself: pure Flax Linen modules, and nothing about training or text."""
