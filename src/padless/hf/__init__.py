"""What padless knows of transformers: its eras, its masks, its caches. Nothing below knows it."""
