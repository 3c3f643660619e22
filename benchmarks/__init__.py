"""Measurements, each one command: python -m benchmarks.overhead, .scaling, .digits."""
