"""Parts that soft and KV methods share: segments, memory tokens, pooling, projectors, questions."""
