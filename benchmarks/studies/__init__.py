"""Studies of single questions, each with rows of its own."""
