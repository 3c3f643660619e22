"""Simulation of one step as events on the streams of every worker."""
