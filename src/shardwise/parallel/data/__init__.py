"""Data parallelism: the engine that runs a module unchanged, on DDP or fully_shard, and gradient buckets."""
