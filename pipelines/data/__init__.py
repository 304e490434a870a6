"""Prepared arrays, read: rows, batches, and the streams that some models want beside them."""
