"""Recipes: one YAML per method, the one trainer that runs them all, and the data they read."""
