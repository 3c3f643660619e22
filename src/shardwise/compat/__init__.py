"""Interfaces of other software: scripts that were written for it run with Shardwise.

    horovod     the calls of `horovod.torch`, on torch.distributed
"""
