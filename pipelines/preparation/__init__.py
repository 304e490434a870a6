"""Prepared arrays, written: layouts, splits, and the stages that decode pictures once."""
