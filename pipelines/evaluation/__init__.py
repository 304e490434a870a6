"""Scores: how good, how sure, and shown."""
