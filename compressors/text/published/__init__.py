"""The LLMLingua family as its authors released it, reached by ``mode="published"``."""
