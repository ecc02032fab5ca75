"""The reader: a causal LM that reads prompts of text and compressed passages."""
