"""Pictures as arrays: decoding, overlays, panels; never torch."""
