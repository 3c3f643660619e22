"""Elastic training as in `horovod.torch.elastic`: `TorchState`, `run` and `ElasticSampler`."""

from shardwise.compat.horovod.elastic.loop import run as run
from shardwise.compat.horovod.elastic.sampler import ElasticSampler as ElasticSampler
from shardwise.compat.horovod.elastic.state import TorchState as TorchState

State = TorchState
"""Name of the base class in Horovod."""

__all__ = ["ElasticSampler", "State", "TorchState", "run"]
