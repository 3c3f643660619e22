"""The training loop, checkpoints, measurements: what happens on disk and in time."""
