"""Clusters to train on: devices, the links between them, and their speed."""
