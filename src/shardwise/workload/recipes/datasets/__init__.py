"""The recipes' data: map-style, read lazily, the same on every machine and in every process."""
