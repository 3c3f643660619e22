"""Calibration of this machine as a cluster: measured once, stored, and read again."""
