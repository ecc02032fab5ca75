"""Methods whose compressed passage is a sequence of soft embeddings."""
