"""What a strategy will cost: dry run of the real program, closed form, timeline."""
