"""Profile of one step on one device: kernels, parameters and activations of each segment of its graph."""
