"""Times of kernels and collectives on the devices and links of a cluster."""
