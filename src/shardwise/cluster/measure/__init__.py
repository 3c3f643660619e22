"""Measurements of a machine: kernels, collectives, its host, and how they slow each other."""
