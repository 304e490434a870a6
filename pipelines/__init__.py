"""Everything that touches disk, time or the outside."""
