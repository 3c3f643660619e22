"""Pipeline parallelism: cut points of a traced step, its stages, and the executor of their schedule."""
