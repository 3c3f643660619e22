"""Ray: the launcher `--engine ray`. One actor a worker, in one placement group, each with a process of its own.

    driver ── placement group ──┬── actor ── python -m shardwise train ...   rank 0
                                └── actor ── python -m shardwise train ...   rank 1

It runs in the cluster that this program has joined (`ray.init`), or joins the one that RAY_ADDRESS names (`auto`: the
one on this host), or else starts one on the loopback device. It leaves only what it has joined or started itself.
Source: https://docs.ray.io/en/latest/ray-core/scheduling/placement-group.html
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Mapping
from typing import Any

from shardwise.errors import RequestError
from shardwise.launch.engines.member import Member, Roll, member_environment, shared_environment
from shardwise.launch.launcher import Allocation, LaunchRequest, no_hosts, no_script, not_installed
from shardwise.launch.ranks import LOOPBACK

PLACED_SECONDS = 120
"""Seconds to wait for the cluster to have room for all workers."""

ANSWER_SECONDS = 60
"""Seconds that actors may take to answer before they count as lost."""


class Seat(Member):
    """Actor of one worker."""

    def place(self) -> tuple[str, str, list[str]]:
        """Return the identifier and address of this node, and the GPUs that Ray gave the actor."""
        import ray

        context = ray.get_runtime_context()
        return context.get_node_id(), ray.util.get_node_ip_address(), [str(each) for each in ray.get_gpu_ids()]


class RayLauncher:
    """Launcher of jobs on a cluster of Ray."""

    name = "ray"

    def __init__(self) -> None:
        self._joined = False

    def allocated(self, environment: Mapping[str, str]) -> Allocation | None:
        """Return None: a cluster is no allocation, it may have other work."""
        return None

    def check(self, asked: LaunchRequest) -> None:
        """Check that Ray is there and that its cluster has a CPU for each worker. Raises RequestError."""
        if asked.hosts:
            raise no_hosts(self.name, "it places workers itself; RAY_ADDRESS names the cluster")
        ray = _ray()
        self._joined = _connect(asked)
        cpus = int(ray.cluster_resources().get("CPU", 0))
        if cpus < asked.workers:
            if self._joined:
                ray.shutdown()
            raise RequestError(
                f"engine ray: the strategy needs {asked.workers} workers, the cluster has {cpus} CPUs: use --workers "
                f"{cpus}, or add nodes (ray start)"
            )

    def start(self, asked: LaunchRequest) -> RayJob:
        """Start the job. Raises RequestError if the cluster has no room."""
        return RayJob(asked, leaves=self._joined)

    def script(self, asked: LaunchRequest) -> str:
        """Raise RequestError: Ray starts a job at once."""
        raise no_script(self.name)


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise not_installed("ray", "ray", "it with pip install ray") from None
    return ray


def _connect(asked: LaunchRequest) -> bool:
    """Join the cluster that runs, or start one on the loopback device. Returns False if this program is in one."""
    ray = _ray()
    if ray.is_initialized():
        return False
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    address = asked.environment.get("RAY_ADDRESS")
    if address is None:  # never `auto`, which may be the private cluster of another job, and end with it
        ray.init(address="local", num_cpus=asked.workers, include_dashboard=False, _node_ip_address=LOOPBACK, **quiet)
        return True
    try:
        ray.init(address=address, **quiet)
        return True
    except ConnectionError as error:
        raise RequestError(
            f"engine ray: no cluster answers at RAY_ADDRESS={address}: nothing was started; start it, or "
            "unset RAY_ADDRESS"
        ) from error


class RayJob:
    """Job of actors; `leaves` says whether its end leaves the cluster too."""

    def __init__(self, asked: LaunchRequest, *, leaves: bool) -> None:
        ray = _ray()
        from ray.util.placement_group import placement_group

        gpus = int(ray.cluster_resources().get("GPU", 0) >= asked.workers)
        bundle = {"CPU": 1, **({"GPU": 1} if gpus else {})}
        self._name, self._leaves = RayLauncher.name, leaves
        self._roll = Roll(asked.workers)
        self._seats: list[Any] = []
        self._group = placement_group([bundle] * asked.workers, strategy="PACK")
        try:
            if not self._group.wait(PLACED_SECONDS):
                raise RequestError(
                    f"engine ray: the cluster had no room for {asked.workers} workers within {PLACED_SECONDS} s: ray "
                    "status shows what it has and what waits"
                )
            self._seat(asked, gpus)
        except BaseException:
            self.kill()
            raise

    def _seat(self, asked: LaunchRequest, gpus: int) -> None:
        """Start an actor in each bundle and its worker; ranks follow the nodes, those of a node in a row."""
        ray = _ray()
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        actor = ray.remote(Seat)
        settings = {"env_vars": {"PYTHONPATH": asked.environment["PYTHONPATH"]}} if _has_path(asked) else {}
        seats = [
            actor.options(
                num_cpus=1,
                num_gpus=gpus,
                runtime_env=settings,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index),
            ).remote()
            for index in range(asked.workers)
        ]
        self._seats = seats
        places = ray.get([seat.place.remote() for seat in seats])
        nodes = [node for node, _, _ in places]
        order = sorted(range(len(seats)), key=lambda index: (nodes.index(nodes[index]), index))
        self._seats, places = [seats[index] for index in order], [places[index] for index in order]
        hosts = [node for node, _, _ in places]
        beyond = len(set(hosts)) > 1
        port = ray.get(self._seats[0].listen.remote(beyond))
        address = places[0][1] if beyond else LOOPBACK
        starts = []
        for rank, seat in enumerate(self._seats):
            own = member_environment(self._name, rank, hosts, address, port, shared_environment(asked.environment))
            if gpus:
                own["CUDA_VISIBLE_DEVICES"] = ",".join(
                    number
                    for host, (_, _, given) in zip(hosts, places, strict=True)
                    if host == hosts[rank]
                    for number in given
                )
            starts.append(seat.start.remote(asked.command, own, os.getcwd()))
        ray.get(starts)

    def poll(self) -> int | None:
        """Print what the workers have written, and return the job's exit status. Returns None while it runs."""
        ray = _ray()
        asked = {rank: seat.take.remote() for rank, seat in enumerate(self._seats) if rank not in self._roll.ended}
        for rank, answer in asked.items():
            try:
                lines, status = ray.get(answer, timeout=ANSWER_SECONDS)
            except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
                self._roll.lose(rank, str(error).partition("\n")[0])
                continue
            self._roll.note(rank, lines, status)
        return self._roll.status()

    def stop(self) -> None:
        """Tell all workers to write a checkpoint and end."""
        for seat in self._seats:
            seat.send.remote(int(signal.SIGTERM))

    def kill(self) -> None:
        """End all workers at once, and leave the cluster if this job has joined it."""
        ray = _ray()
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get([seat.kill.remote() for seat in self._seats], timeout=ANSWER_SECONDS)
        for seat in self._seats:
            ray.kill(seat)
        with contextlib.suppress(ray.exceptions.RayError):
            ray.util.remove_placement_group(self._group)
        if self._leaves:
            ray.shutdown()


def _has_path(asked: LaunchRequest) -> bool:
    return "PYTHONPATH" in asked.environment
