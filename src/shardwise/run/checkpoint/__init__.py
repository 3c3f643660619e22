"""Checkpoints: written in the background, checked, read under any other strategy, and exported."""
