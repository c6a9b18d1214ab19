"""The generic engine: devices, state, optimizer, step, checkpoint, loop. Knows nothing of BERT."""
