"""Training software as values: which kernels it runs, what it overlaps, and what it holds in memory."""
