"""The cluster that this machine is: measured once, kept in the user's cache folder, and used by every run after.

The environment says otherwise where SHARDWISE_CLUSTER is a cluster file, or `off`: then nothing is measured.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import torch

from shardwise.cluster import machine
from shardwise.cluster.cluster import Cluster
from shardwise.cluster.reading import read_cluster
from shardwise.cluster.writing import write_cluster
from shardwise.errors import ClusterError, NotMeasured
from shardwise.launch.context import rank_context, under_launcher
from shardwise.workload.recipes.datasets.cache import cache_folder, check_writable

SETTING = "SHARDWISE_CLUSTER"
OFF = "off"

FORMAT = 5
"""Of what is measured: older files are not used."""


def cluster_at_hand(*, quiet: bool = False) -> Cluster:
    """The cluster of this machine; measured now where that was not done before.

    Args:
        quiet: do not say that it is being measured.

    Raises:
        NotMeasured: measuring is off, or not possible here.
        ClusterError: the file that is set is wrong.
        WorkerFailed: a worker died while it was measured.
    """
    setting = os.environ.get(SETTING, "")
    if setting == OFF:
        raise NotMeasured(f"this machine is not measured: {SETTING}={OFF}")
    if setting:
        return read_cluster(setting)
    check_place()
    path = cached_file()
    if path.is_file():
        try:
            return read_cluster(path)
        except ClusterError:
            path.unlink()  # of another version, or damaged: it is measured again
    if under_launcher():
        raise NotMeasured(f"this machine has not been measured: run shardwise calibrate, or set {SETTING} to a file")
    if not quiet:
        sys.stderr.write(f"measuring this machine once, for predictions ({SETTING}={OFF} leaves them out)\n")
    from shardwise.run.calibrate import QUICK, calibrate  # a second to import, for what is done once per machine

    cluster = calibrate(effort=QUICK, quiet=quiet)
    assert cluster is not None
    keep(cluster)
    return cluster


def check_place() -> None:
    """Raises NotMeasured where a cluster cannot be kept: it would be measured, for a minute, at every start."""
    try:
        check_writable()
    except OSError as error:
        raise NotMeasured(
            f"what is measured cannot be kept in {error.filename} ({error.strerror}): set XDG_CACHE_HOME to a folder "
            f"that can be written, or {SETTING} to a cluster file"
        ) from None


def check_hosts() -> None:
    """Raises NotMeasured where an outer launcher's workers are on several hosts, of which no file says anything."""
    context = rank_context()
    if context is not None and not context.one_host and os.environ.get(SETTING, "") in ("", OFF):
        raise NotMeasured(
            f"{context.workers} workers on several hosts have not been measured: run shardwise calibrate with the "
            f"same launcher, and set {SETTING} to its file"
        )


def keep(cluster: Cluster) -> None:
    """Makes this the cluster of this machine."""
    write_cluster(cluster, cached_file())


def cached_file() -> Path:
    """Where this machine's cluster is kept: by processor, number of cores, GPUs and version of torch."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    facts = (FORMAT, machine.processor(), machine.cores(), gpus, torch.__version__)
    return cache_folder() / f"cluster-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}.toml"
