"""What is trained: the value, its data, its traced graph, the recipes."""
