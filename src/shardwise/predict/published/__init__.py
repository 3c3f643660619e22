"""Training runs that others published, read from a CSV and held against predictions."""
