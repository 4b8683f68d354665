"""Examples of chain attention by itself."""
