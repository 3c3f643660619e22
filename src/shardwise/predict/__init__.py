"""Prediction of time and memory of a strategy: closed form, timeline, and dry run of the real program."""
