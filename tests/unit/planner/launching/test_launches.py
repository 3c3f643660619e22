"""Commands and files of other software: published names, and numbers that multiply to the devices and the batch."""

from __future__ import annotations

import functools
import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser

from shardwise.cluster.cluster import Cluster
from shardwise.cluster.find import find_cluster
from shardwise.planner.constraints import Constraints
from shardwise.planner.launching.software import launch_document
from shardwise.planner.search.space import divisors, families, members
from shardwise.predict.profile.source import ProfileSource
from shardwise.predict.simulate import profiles_on
from shardwise.strategy import Strategy
from shardwise.workload.load import load_workload

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SPEC = "gpt:layers=8,hidden=128,heads=8,kv_heads=4,ffn=384,vocabulary=512,sequence=64,batch_size=16"
WORKERS, BATCH, LAYERS = 8, 16, 8

PUBLISHED = tomllib.loads((Path(__file__).parent / "published_arguments.toml").read_text(encoding="utf-8"))


@functools.cache
def cluster() -> Cluster:
    return find_cluster("h100x16")


@functools.cache
def source(runtime: str) -> ProfileSource:
    return profiles_on(load_workload(SPEC), cluster(), runtime)


def grid(runtime: str) -> Iterator[Strategy]:
    """Every strategy of the software on eight devices, those that recompute a part and those that offload too."""
    software = source(runtime).software
    assert software is not None
    constraints = Constraints(software=software)
    tensor = [tp for tp in divisors(WORKERS) if software.degree_refusal(tp) is None]
    for family in families(WORKERS, BATCH, constraints, tensor, LAYERS + 2):
        for strategy in members(family, constraints, (8,)):
            yield strategy
            for changes in ({"recompute": "1/2"}, {"offload": 1}, {"precision": "float32"}, {"outermost": "dp"}):
                if not (changes.get("offload") and not strategy.splits_parameters):
                    other = strategy.with_(**changes)
                    if software.refusal(other) is None:
                        yield other


@functools.cache
def launches(runtime: str) -> list[tuple[Strategy, dict[str, Any]]]:
    return [(strategy, launch_document(source(runtime), strategy, cluster())) for strategy in grid(runtime)]


def started(arguments: list[str]) -> tuple[int, list[str]]:
    """Workers that torchrun starts, as torch itself reads its arguments, and the words after the program."""
    options = get_args_parser().parse_args(arguments[1:])
    each, hosts = int(options.nproc_per_node), int(options.nnodes)
    return each * hosts, [options.training_script, *options.training_script_args]


@pytest.mark.parametrize(
    ("runtime", "least"), [("megatron", 300), ("torchtitan", 300), ("deepspeed", 20), ("accelerate", 50)]
)
def test_the_grid_is_wide(runtime: str, least: int) -> None:
    assert len(launches(runtime)) > least


def read_megatron(words: list[str]) -> dict[str, str]:
    """Read the arguments as Megatron-LM's parser does, by the published names."""
    known, choices = PUBLISHED["megatron"], PUBLISHED["megatron"]["choices"]
    switches, numbers = known["switches"].split(), known["numbers"].split()
    found: dict[str, str] = {}
    rest = iter(words)
    for word in rest:
        assert word not in found, f"{word} twice"
        if word in switches:
            found[word] = ""
            continue
        assert word in numbers or word in choices, f"{word} is not published"
        found[word] = next(rest)
        assert word in numbers or found[word] in choices[word]
        assert word not in numbers or float(found[word]) >= 0
    return found


def test_megatron() -> None:
    for strategy, launch in launches("megatron"):
        workers, (program, *words) = started(launch["arguments"])
        given = read_megatron(words)
        tp, pp = int(given["--tensor-model-parallel-size"]), int(given["--pipeline-model-parallel-size"])
        replicas = workers // (tp * pp)  # Megatron-LM computes data parallelism itself
        assert (program, workers, tp, pp, replicas) == (
            "pretrain_gpt.py",
            WORKERS,
            strategy.tp,
            strategy.pp,
            strategy.replicas,
        )
        assert int(given["--global-batch-size"]) == BATCH
        assert int(given["--micro-batch-size"]) * replicas * strategy.microbatches == BATCH
        assert ("--use-distributed-optimizer" in given) == (strategy.fsdp > 1)
        assert ("--sequence-parallel" in given) == bool(strategy.sp)
        assert ("--bf16" in given) == (strategy.precision != "float32")
        stages = int(given.get("--num-virtual-stages-per-pipeline-rank", 1))
        assert stages == strategy.stages_per_worker
        ends = "--account-for-embedding-in-pipeline-split" in given
        assert ends == ("--account-for-loss-in-pipeline-split" in given)
        assert (LAYERS + 2 * ends) % (pp * stages) == 0
        again = int(given.get("--recompute-num-layers", 0))
        part = strategy.recompute.partial
        assert again == (strategy.recomputed_of(LAYERS // pp // stages) if part else int(strategy.recomputes))
        assert given.get("--recompute-method", "block" if part else "") == (
            "block" if part else "uniform" if strategy.recomputes else ""
        )
        dp_outside = strategy.pp > 1 and strategy.replicas > 1 and strategy.outermost == "dp"
        assert ("--use-tp-pp-dp-mapping" in given) == dp_outside


def test_torchtitan() -> None:
    known, choices = PUBLISHED["torchtitan"], PUBLISHED["torchtitan"]["choices"]
    for strategy, launch in launches("torchtitan"):
        workers, words = started(launch["arguments"])
        assert words == ["torchtitan.train", "--job.config_file", "torchtitan.toml"]
        assert "config_file" in known["tables"]["job"].split()
        tables = tomllib.loads(launch["files"]["torchtitan.toml"])
        for table, values in tables.items():
            assert set(values) <= set(known["tables"][table].split()), table
            assert all(value in choices[name] for name, value in values.items() if name in choices)
        degrees, training = tables["parallelism"], tables["training"]
        names = ("data_parallel_replicate", "data_parallel_shard", "tensor_parallel", "pipeline_parallel")
        found = [degrees[f"{name}_degree"] for name in names]
        assert found == [strategy.dp, strategy.fsdp, strategy.tp, strategy.pp]
        assert math.prod(found) == workers == WORKERS
        assert training["global_batch_size"] == BATCH
        local = training["local_batch_size"]
        samples = BATCH // strategy.replicas // strategy.microbatches
        if strategy.pp > 1:
            assert local * strategy.replicas == BATCH
            assert local // degrees["pipeline_parallel_microbatch_size"] == strategy.microbatches
            points = [int(point.removeprefix("layers.")) for point in degrees["pipeline_parallel_split_points"]]
            assert len(points) == strategy.pp * strategy.stages_per_worker - 1
            assert points == sorted(set(points))
            assert 0 < points[0] <= points[-1] < LAYERS
        else:
            assert (local, BATCH // (local * strategy.replicas)) == (samples, strategy.microbatches)
        resharding = degrees.get("fsdp_reshard_after_forward")
        assert (resharding == "never") == (strategy.fsdp > 1 and strategy.zero == 2)
        assert tables["activation_checkpoint"]["mode"] == str(strategy.recompute)


def test_schedules_of_torchtitan_are_those_of_torch() -> None:
    from torch.distributed.pipelining.schedules import get_schedule_class

    from shardwise.planner.launching.torchtitan import SCHEDULES

    assert [get_schedule_class(name).__name__ for name in SCHEDULES.values()] == [
        "Schedule1F1B",
        "ScheduleGPipe",
        "ScheduleInterleaved1F1B",
    ]


@pytest.mark.parametrize("ffn", [384, 1000, 1001, 11008, 14336, 53248])
def test_the_flavor_of_torchtitan_has_the_width_of_the_mlp(ffn: int) -> None:
    workload = load_workload(SPEC.replace("ffn=384", f"ffn={ffn}"))
    profiles = profiles_on(workload, cluster(), "torchtitan")
    text = launch_document(profiles, Strategy(), cluster())["files"]["flavor.py"]
    given = dict(re.findall(r"(\w+)=([0-9.]+)", text))
    assert set(given) <= set(PUBLISHED["torchtitan_model"]["names"].split())
    hidden = int(2 * 4 * int(given["dim"]) / 3)  # torchtitan/models/llama3/model/model.py, FeedForward
    hidden = int(float(given["ffn_dim_multiplier"]) * hidden)
    multiple = int(given["multiple_of"])
    assert multiple * ((hidden + multiple - 1) // multiple) == ffn


def check_names(settings: dict[str, Any], known: dict[str, Any]) -> None:
    assert set(settings) <= set(known["names"].split())
    for name, value in settings.items():
        if isinstance(value, dict):
            check_names(value, {"names": known["inside"][name], "inside": known["inside"]})


def test_deepspeed() -> None:
    launcher = PUBLISHED["deepspeed_launcher"]["names"].split()
    for strategy, launch in launches("deepspeed"):
        program, hosts_word, hosts, gpus_word, gpus, script, *_ = launch["arguments"]
        assert (program, script) == ("deepspeed", "train.py")
        assert {hosts_word, gpus_word} <= set(launcher)
        assert int(hosts) * int(gpus) == WORKERS
        settings = json.loads(launch["files"]["ds_config.json"])
        check_names(settings, PUBLISHED["deepspeed"])
        accumulated = settings["gradient_accumulation_steps"]
        assert settings["train_micro_batch_size_per_gpu"] * accumulated * WORKERS == settings["train_batch_size"]
        assert (settings["train_batch_size"], accumulated) == (BATCH, strategy.microbatches)
        zero = settings["zero_optimization"]
        assert zero["stage"] == strategy.zero
        assert ("offload_optimizer" in zero) == bool(strategy.offload)
        assert ("offload_param" in zero) == (bool(strategy.offload) and strategy.zero == 3)
        assert ("bf16" in settings) == (strategy.precision != "float32")


def test_accelerate() -> None:
    choices, launcher = PUBLISHED["accelerate"]["choices"], PUBLISHED["accelerate_launcher"]["names"].split()
    for strategy, launch in launches("accelerate"):
        assert launch["arguments"] == ["accelerate", "launch", "--config_file", "accelerate.yaml", "train.py"]
        assert launch["arguments"][2] in launcher
        settings = yaml.safe_load(launch["files"]["accelerate.yaml"])
        check_names(settings, PUBLISHED["accelerate"])
        assert all(settings[name] in values for name, values in choices.items())
        assert settings["num_processes"] == WORKERS
        sharded = settings.get("fsdp_config")
        assert (sharded is not None) == (strategy.fsdp > 1)
        if sharded is not None:
            assert sharded["fsdp_reshard_after_forward"] == (strategy.zero == 3)
            assert sharded["fsdp_activation_checkpointing"] == strategy.recomputes
            assert sharded["fsdp_offload_params"] == bool(strategy.offload)
            assert sharded["fsdp_transformer_layer_cls_to_wrap"] == "DecoderBlock"
        mesh = settings.get("parallelism_config")
        assert (mesh is not None) == (strategy.dp > 1 and strategy.fsdp > 1)
        if mesh is not None:
            assert math.prod(mesh.values()) == WORKERS
            assert mesh["parallelism_config_dp_replicate_size"] == strategy.dp
        accumulating = [note for note in launch["notes"] if "accumulation" in note]
        assert len(accumulating) == (strategy.microbatches > 1)
        assert all(str(strategy.microbatches) in note for note in accumulating)


@pytest.mark.parametrize(("workers", "hosts"), [(1, (1, 1)), (4, (1, 4)), (12, (2, 6)), (16, (2, 8))])
def test_hosts_and_their_devices_multiply_to_the_workers(workers: int, hosts: tuple[int, int]) -> None:
    strategy = Strategy(fsdp=workers) if workers > 1 else Strategy()
    profiles = profiles_on(
        load_workload(SPEC.replace("batch_size=16", f"batch_size={workers}")), cluster(), "deepspeed"
    )
    arguments = launch_document(profiles, strategy, cluster())["arguments"]
    assert (int(arguments[2]), int(arguments[4])) == hosts
