"""Verification that parallel training equals the training of one process."""
