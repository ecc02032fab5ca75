"""Methods whose compressed passage is a short KV cache."""
