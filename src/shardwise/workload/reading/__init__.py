"""Reading of samples: the order of an epoch, the draws of augmentation, loading processes, and what samples hold."""
