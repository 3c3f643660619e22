"""Parameters and buffers of a worker: their layout in global tensors, building, filling and gathering them."""
