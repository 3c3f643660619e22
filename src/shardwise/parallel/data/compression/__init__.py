"""Compression of gradients with error feedback: the reducer, and its methods."""
