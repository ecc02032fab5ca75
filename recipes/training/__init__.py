"""The trainer: recipe schema, stages, checkpoints, progress."""
