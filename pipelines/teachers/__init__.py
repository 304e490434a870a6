"""Networks that others learn from."""
