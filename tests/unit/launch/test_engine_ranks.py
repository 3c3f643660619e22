"""Ranks as Open MPI and Slurm say them, and where their workers meet."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import shardwise
from shardwise.errors import RequestError
from shardwise.launch.context import LOCAL_WORKER, rank_context
from shardwise.launch.engines.slurm import first_host, tasks_per_node
from shardwise.launch.meeting import PORTS, TRIES, ports_of
from shardwise.launch.ranks import is_passed_on

MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_MCA_orte_hnp_uri": "2041446400.0;tcp://10.0.0.1,127.0.0.1:43211",
    "PMIX_NAMESPACE": "2041446401",
}
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURM_STEP_NODELIST": "n[08-10],m1",
}


def test_a_worker_of_open_mpi() -> None:
    context = rank_context(MPI)
    assert context is not None
    assert (context.rank, context.workers, context.local_rank, context.local_workers) == (3, 4, 1, 2)
    assert (context.engine, context.address, context.port) == ("mpi", "10.0.0.1,127.0.0.1", 0)
    assert not context.keeps_store


def test_the_first_worker_on_the_host_of_mpirun_keeps_the_store_whatever_its_rank() -> None:
    context = rank_context(MPI | {"OMPI_COMM_WORLD_LOCAL_RANK": "0"})
    assert context is not None
    assert context.keeps_store


def test_on_one_host_rank_0_of_open_mpi_keeps_the_store_on_the_loopback_device() -> None:
    context = rank_context(MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"})
    assert context is not None
    assert (context.one_host, context.address, context.keeps_store) == (True, "127.0.0.1", True)


def test_an_mpirun_that_does_not_say_where_it_runs_is_told_to() -> None:
    with pytest.raises(RequestError, match="mpirun -x MASTER_ADDR=host"):
        rank_context({name: value for name, value in MPI.items() if "hnp" not in name})


def test_a_worker_of_slurm() -> None:
    context = rank_context(SLURM)
    assert context is not None
    assert (context.rank, context.workers, context.local_rank, context.local_workers) == (5, 7, 1, 2)
    assert (context.engine, context.address, context.port, context.keeps_store) == ("slurm", "n08", 0, False)


def test_the_first_worker_on_the_first_node_keeps_the_store_whatever_its_rank() -> None:
    context = rank_context(SLURM | {"SLURM_NODEID": "0", "SLURM_LOCALID": "0"})
    assert context is not None
    assert context.keeps_store


def test_an_address_that_the_user_names_comes_first() -> None:
    for environment in (MPI, SLURM):
        context = rank_context(environment | {"MASTER_ADDR": "host", "MASTER_PORT": "29500"})
        assert context is not None
        assert (context.address, context.port, context.key) == ("host", 29500, "")


@pytest.mark.parametrize(
    "environment",
    [
        {name: value for name, value in SLURM.items() if name != "SLURM_STEP_ID"},  # a batch script
        SLURM | {"SLURM_STEP_ID": "4294967290"},  # the shell of an allocation
        SLURM | {"SLURM_STEP_NUM_TASKS": "1"},
        SLURM | {LOCAL_WORKER: "1"},
        MPI | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        MPI | {LOCAL_WORKER: "1"},
    ],
)
def test_a_process_that_has_no_other_workers_is_none(environment: dict[str, str]) -> None:
    assert rank_context(environment) is None


def test_rank_and_world_size_come_before_what_a_scheduler_says() -> None:
    named = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}
    context = rank_context(MPI | SLURM | named)
    assert context is not None
    assert (context.workers, context.engine) == (2, "environment")
    context = rank_context(MPI | SLURM)  # mpirun within an allocation
    assert context is not None
    assert context.engine == "mpi"


def test_a_node_beyond_the_step_is_refused() -> None:
    with pytest.raises(RequestError, match="SLURM_NODEID=4 and SLURM_STEP_TASKS_PER_NODE=2"):
        rank_context(SLURM | {"SLURM_NODEID": "4"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n1,m2", "n1"), ("n[1-3,7],m1", "n1"), ("n[08,10]", "n08"), ("r[1-2]n[3-4].x", "r1n3.x"), ("", "")],
)
def test_the_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_tasks_of_each_node() -> None:
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    assert tasks_per_node("4") == [4]


def test_ports_of_two_jobs_differ() -> None:
    one, two = ports_of("slurm a 7 0"), ports_of("slurm a 7 1")
    assert one == ports_of("slurm a 7 0")
    assert len(one) == TRIES
    assert one[0] != two[0]
    assert set(one) <= set(PORTS)


def test_ranks_are_read_in_one_place() -> None:
    source = Path(shardwise.__file__).parent
    names = r"environ\b.*\b(RANK|WORLD_SIZE|LOCAL_RANK|MASTER_ADDR|MASTER_PORT|SLURM_\w+|OMPI_\w+|PMIX_\w+)\b"
    assert [path.name for path in source.rglob("*.py") if re.search(names, path.read_text())] == []


TREE = {"SLURM_TOPOLOGY_ADDR": "root.leaf.m1", "SLURM_TOPOLOGY_ADDR_PATTERN": "switch.switch.node"}


@pytest.mark.parametrize(
    ("said", "switch"),
    [
        (TREE, "root.leaf"),
        (TREE | {"SHARDWISE_SWITCH": "mine"}, "root.leaf"),
        ({"SLURM_TOPOLOGY_ADDR": "m1", "SLURM_TOPOLOGY_ADDR_PATTERN": "node"}, ""),
        ({"SLURM_TOPOLOGY_ADDR": "b1.m1", "SLURM_TOPOLOGY_ADDR_PATTERN": "block.node"}, ""),
        ({"SHARDWISE_SWITCH": "mine"}, "mine"),
        ({}, ""),
    ],
)
def test_slurm_names_the_switches_of_a_node(said: dict[str, str], switch: str) -> None:
    context = rank_context(SLURM | said)
    assert context is not None
    assert context.switch == switch


def test_a_variable_names_the_switch_for_other_launchers() -> None:
    variables = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    for env in (MPI, variables):
        context = rank_context(env | {"SHARDWISE_SWITCH": "leaf-3"})
        assert context is not None
        assert context.switch == "leaf-3"


def test_settings_go_along_to_other_hosts_but_not_the_switch_of_this_one() -> None:
    names = ("SHARDWISE_CLUSTER", "SHARDWISE_SWITCH", "PYTHONPATH", "HOME", "WANDB_API_KEY")
    assert [name for name in names if is_passed_on(name)] == ["SHARDWISE_CLUSTER", "PYTHONPATH"]
