"""Engine that runs the traced graph of a module: tensor and pipeline parallelism and their products."""
