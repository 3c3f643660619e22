"""Choice of a strategy.

In `search`, `space` lists the strategies, `time_bounds` and `memory_bounds` give lower bounds of their cost, and
`search` finds the best one. `explain` says why it is the best.
"""
