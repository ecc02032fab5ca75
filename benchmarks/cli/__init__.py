"""The ``nutgraf bench`` commands."""
