"""Short strings that stand for compressed passages inside the prompts of a framework."""
