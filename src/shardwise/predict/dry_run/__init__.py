"""Dry run of one rank's real program without memory and without other workers."""
