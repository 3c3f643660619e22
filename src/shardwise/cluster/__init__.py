"""What there is to train on: devices, the links between them, and how fast they are."""
