"""Search for the best strategy: candidates, lower bounds of their cost, and the order to evaluate them in."""
