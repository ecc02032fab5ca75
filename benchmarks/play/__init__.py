"""``nutgraf play``: a page on this machine that answers a question from compressed passages, side by side."""
