"""The whole grid of cells, run one beside another."""
