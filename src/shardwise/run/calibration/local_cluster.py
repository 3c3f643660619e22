"""Cluster of this machine: measured once, cached in the user's cache folder, and used by every later run.

The environment variable SHARDWISE_CLUSTER overrides it with a cluster file; with `off` nothing is measured.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import torch

from shardwise.cluster.cluster import Cluster
from shardwise.cluster.measure import machine
from shardwise.cluster.measure.interference import await_quiet, is_busy
from shardwise.cluster.toml_reader import read_cluster
from shardwise.cluster.toml_writer import write_cluster
from shardwise.errors import ClusterError, NotMeasured
from shardwise.launch.context import rank_context, under_launcher
from shardwise.launch.shared_memory.choice import SETTING as TRANSPORT
from shardwise.launch.shared_memory.choice import TRANSPORTS, transport
from shardwise.run.calibration.trust import disturbed
from shardwise.workload.recipes.datasets.cache import cache_folder, check_writable

SETTING = "SHARDWISE_CLUSTER"
OFF = "off"

FORMAT = 9
"""Version of the measurements; cached files of older versions are not used."""


def cluster_at_hand(*, quiet: bool = False) -> Cluster:
    """Return the cluster of this machine; measure it now if it is not in the cache.

    A measurement that other programs disturbed is made again once the machine is idle, and used with a warning until
    then.

    Args:
        quiet: do not print that it is being measured.

    Raises:
        NotMeasured: measuring is switched off, or not possible here; or the cluster file that the environment sets was
            measured with another transport than workers use here.
        ClusterError: that file is wrong.
        WorkerFailed: a worker died during the measurement.
    """
    setting = os.environ.get(SETTING, "")
    if setting == OFF:
        raise NotMeasured(f"this machine is not measured: {SETTING}={OFF}")
    if setting:
        return _of_this_transport(read_cluster(setting), setting)
    check_place()
    known = _kept()
    if known is not None and not _to_measure_again(known):
        return known
    if under_launcher():
        raise NotMeasured(f"this machine has not been measured: run shardwise calibrate, or set {SETTING} to a file")
    if not quiet and known is not None:
        sys.stderr.write("measuring this machine again: it was busy with other programs the last time\n")
    elif not quiet:
        sys.stderr.write(f"measuring this machine once, for predictions ({SETTING}={OFF} leaves them out)\n")
    from shardwise.run.calibration.calibrate import (  # takes a second to import, needed once per machine
        QUICK,
        calibrate,
    )

    cluster = calibrate(effort=QUICK, quiet=quiet)
    assert cluster is not None
    keep(cluster)
    return cluster


def _of_this_transport(cluster: Cluster, path: str) -> Cluster:
    """Return a cluster that was measured with the transport of workers here. Raises NotMeasured if it was not."""
    backend = cluster.software.get("backend")
    if backend in TRANSPORTS and backend != transport():
        raise NotMeasured(
            f"{path} was measured with {TRANSPORT}={backend}, workers use {transport()} here: run shardwise calibrate "
            f"--out {path} again, or set {TRANSPORT}={backend}"
        )
    return cluster


def _kept() -> Cluster | None:
    """Return the cluster in the cache, None if there is none; remove a file that is damaged or of another version."""
    path = cached_file()
    if not path.is_file():
        return None
    try:
        return read_cluster(path)
    except ClusterError:
        path.unlink()
        return None


def _to_measure_again(known: Cluster) -> bool:
    """Return whether a measurement was disturbed and can be made again now; if not yet, print how uncertain it is."""
    if not is_busy(known.busy):
        return False
    if not under_launcher() and not is_busy(await_quiet(0.0)):
        return True
    sys.stderr.write(f"{disturbed(known)}\n")
    return False


def check_place() -> None:
    """Check that the cache folder is writable; otherwise each start would measure the machine again for a minute.

    Raises:
        NotMeasured: the folder cannot be written.
    """
    try:
        check_writable()
    except OSError as error:
        raise NotMeasured(
            f"what is measured cannot be kept in {error.filename} ({error.strerror}): set XDG_CACHE_HOME to a folder "
            f"that can be written, or {SETTING} to a cluster file"
        ) from None


def check_hosts() -> None:
    """Check that the workers of an outer launcher share one host, or that a cluster file is set.

    Raises:
        NotMeasured: they are on several hosts, and no file describes these.
    """
    context = rank_context()
    if context is not None and not context.one_host and os.environ.get(SETTING, "") in ("", OFF):
        raise NotMeasured(
            f"{context.workers} workers on several hosts have not been measured: run shardwise calibrate with the "
            f"same launcher, and set {SETTING} to its file"
        )


def keep(cluster: Cluster) -> None:
    """Write a cluster to the cache as the cluster of this machine."""
    write_cluster(cluster, cached_file())


def cached_file() -> Path:
    """Return the path of this machine's cluster in the cache.

    Its key is made of the processor, its cores, the GPUs, the version of torch, and how workers on CPUs communicate.
    """
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    facts = (FORMAT, machine.processor(), machine.cores(), gpus, torch.__version__, transport())
    return cache_folder() / f"cluster-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}.toml"
