"""Collectives and messages between the workers of one host, through memory that they share."""
