"""Runs: the training loop, checkpoints, measurements, verification and calibration."""
