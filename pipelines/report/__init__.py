"""All cells, told: tables, pages, comparisons."""
