"""Choice of a strategy.

`space` lists the strategies, `bounds` gives lower bounds of their cost, `search` finds the best one, and `explain` says
why it is the best.
"""
