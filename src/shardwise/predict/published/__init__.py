"""Comparison of predictions with training runs that others published, read from a CSV file."""
