"""Data of the recipes: map-style, read lazily, equal on every machine and in every process."""
