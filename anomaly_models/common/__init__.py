"""What several of the models share."""
