"""params.yaml, read strictly and given types; presets."""
