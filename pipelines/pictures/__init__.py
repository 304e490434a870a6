"""Pictures as arrays: decoding, overlays, panels; numpy and Pillow only."""
