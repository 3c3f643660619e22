"""Operators that must give equal numbers however the work is split: dropout, batch norm, recomputation."""
