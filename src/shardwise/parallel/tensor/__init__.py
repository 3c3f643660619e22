"""Tensor parallelism: the dimension along which each tensor of a traced step is sharded, and the communication."""
