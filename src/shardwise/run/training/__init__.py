"""Training loop, with its measurements, logs and run folder."""
