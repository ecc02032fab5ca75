"""Foundations without models: passages, configs, checkpoints, files, fingerprints, batching."""
