"""The training loop and what it stands on: weights, checkpoints, one run across kills."""
