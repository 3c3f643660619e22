"""Compiled parts of a worker's graph: `compile=1` runs what is between communication through torch's compiler."""
