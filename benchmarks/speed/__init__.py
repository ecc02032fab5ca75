"""Speed suite: compression, prefill, decoding, first token, store, training."""
