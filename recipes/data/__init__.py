"""Training data: corpora, question records, prompts."""
