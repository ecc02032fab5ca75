"""Training of a reader: from scratch, or an adapter on a pretrained base."""
