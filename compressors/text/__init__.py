"""Methods whose compressed passage is a shorter text."""
