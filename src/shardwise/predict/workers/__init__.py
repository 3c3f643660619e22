"""Workers of a strategy in numbers: the parameters each holds, the order of its passes, and its traffic."""
