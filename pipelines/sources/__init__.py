"""Bytes from elsewhere: archives that are fetched and verified, data sets that are drawn."""
