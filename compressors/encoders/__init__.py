"""Encoders that methods are built on: LoRA copies of the reader, smaller LMs, embedders, token classifiers."""
