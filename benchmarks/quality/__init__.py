"""Quality suite: answers from compressed passages against full text and plain baselines."""
