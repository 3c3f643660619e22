"""Interfaces of other software: scripts that were written for it run with Shardwise.

    horovod      the calls of `horovod.torch`, on torch.distributed
    lightning    a Lightning module as a workload
    accelerate   the objects of an Accelerate script as a workload
    keras        Keras 3 models as workloads

Only `keras` needs the software that it stands for.
"""
