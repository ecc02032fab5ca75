"""Cost model: FLOPs, bytes and break-even counts."""
