"""Trackers: TensorBoard, Weights & Biases and MLflow behind one interface."""
