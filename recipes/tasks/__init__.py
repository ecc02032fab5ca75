"""What a recipe can train besides a reader: a compressor or a token classifier."""
