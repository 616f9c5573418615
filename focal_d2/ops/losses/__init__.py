"""The losses, element by element or a level in one pass."""
