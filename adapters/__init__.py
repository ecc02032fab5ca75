"""Adapters: the outside world (RAG frameworks, stores, serving engines)."""
