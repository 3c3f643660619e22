"""Closed form of a step's time and memory, fast enough to search thousands of strategies."""
