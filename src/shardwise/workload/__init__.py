"""Workloads: the value that describes one, its data, its traced graph, and the recipes."""
