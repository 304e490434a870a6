"""Settings searched for on a category's development images, never on its test: verb tune."""
