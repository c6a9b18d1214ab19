"""Text, tokenizers, the token corpus on disk, and batches. No JAX: it runs in worker processes."""
