"""Distil large Transformer encoders into small ones, in JAX."""

__version__ = "0.1.0"
