"""Benchmarks: quality, speed and cost on equal terms, and the report."""
