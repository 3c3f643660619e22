"""Program that trains a model in parallel: one module per parallel axis, assembled in `program`."""
