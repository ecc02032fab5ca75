"""The privacy audit: what someone who copies stored slots, keys and values or vectors can read."""
