"""What runs at the line: an exported file, pictures in, decisions out; never torch."""
