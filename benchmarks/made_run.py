"""Folders of runs with made-up numbers, in the formats of real ones: for tests and benchmarks of reports."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardwise.strategy import Strategy

MIB = 1 << 20


@dataclass(frozen=True)
class MadeRun:
    """A run of made-up numbers; the same values give the same files.

    `slow` is a rank that works 1.5 times as long, `slow_step` a step in which all do, `rotating` a straggler that
    changes. `events` is the number of operations in each of the two timelines.
    """

    strategy: str = "dp=2,pp=2,microbatches=4"
    workload: str = "made-up"
    steps: int = 40
    events: int = 200
    seconds: float = 0.1
    slow: int | None = None
    slow_step: int | None = None
    rotating: bool = False
    nan_from: int | None = None
    ended: bool = True

    @property
    def workers(self) -> int:
        return Strategy.parse(self.strategy).workers

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / "run.json", self.request())
        steps = "".join(json.dumps(line) + "\n" for line in self.metrics())
        (folder / "metrics.jsonl").write_text(steps)
        (folder / "ranks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in self.ranks()))
        write(folder / "prediction.json", self.prediction())
        rows = self.rows(1.04)
        write(
            folder / "timeline.json", {"step": 5, "seconds": [self.seconds] * self.workers, "left_out": 0, "rows": rows}
        )
        write(
            folder / "memory.json",
            {"measured": "made up", "ranks": [self.memory(rank) for rank in range(self.workers)]},
        )
        if self.ended:
            write(folder / "summary.json", self.summary(folder))
        return folder

    def request(self) -> dict[str, Any]:
        return {
            "workload": self.workload,
            "source": "image",
            "settings": {"batch_size": "64"},
            "seed": 0,
            "strategy": self.strategy,
            "workers": self.workers,
            "steps": self.steps,
            "epochs": None,
            "created": "2026-01-02T03:04:05+00:00",
            "versions": {"python": "3.11.7", "torch": "2.13.0", "shardwise": "0.1.0"},
        }

    def metrics(self) -> list[dict[str, Any]]:
        chance = random.Random(1)
        lines: list[dict[str, Any]] = []
        for step in range(1, self.steps + 1):
            finite = self.nan_from is None or step < self.nan_from
            loss = 2.3 * math.exp(-step / 30) + 0.05 * chance.random()
            seconds = self.seconds * (1 + 0.04 * chance.random())
            lines.append(
                {
                    "step": step,
                    "epoch": 0,
                    "loss": loss if finite else None,
                    "learning_rate": 1e-3,
                    "gradient_norm": 1.0,
                    "samples": 64,
                    "seconds": None if step == 1 else seconds,
                    "samples_per_second": None if step == 1 else 64 / seconds,
                }
            )
            if step % 10 == 0:
                values = {"loss": loss * 1.05, "accuracy": 1 - math.exp(-step / 20)}
                lines.append({"step": step, "epoch": 0, "evaluation": values})
        return lines

    def ranks(self) -> list[dict[str, Any]]:
        chance = random.Random(2)
        lines = []
        for step in range(1, self.steps + 1):
            busy = [self.seconds * (0.62 + 0.02 * chance.random()) for _ in range(self.workers)]
            if self.slow is not None:
                busy[self.slow] *= 1.5
            if step == self.slow_step:
                busy = [each * 1.7 for each in busy]
            if self.rotating:
                busy[step % self.workers] *= 1.5
            lines.append({"step": step, "busy_seconds": busy, "seconds": [self.seconds] * self.workers})
        return lines

    def memory(self, rank: int) -> dict[str, Any]:
        parts = {"parameters": 40 * MIB, "gradients": 40 * MIB, "optimizer": 80 * MIB, "rest": (90 + rank % 5) * MIB}
        return {"rank": rank, "peak_bytes": sum(parts.values()), **{f"{name}_bytes": n for name, n in parts.items()}}

    def candidate(self) -> dict[str, Any]:
        seconds = self.seconds * 0.93
        pipeline = "pp=" in self.strategy
        parts = {"compute": 0.62, "exposed_communication": 0.14, "bubble": 0.16 if pipeline else 0.0, "host": 0.02}
        parts["optimizer"] = 1 - sum(parts.values())
        memory = dict.fromkeys(("parameters", "gradients"), 40 * MIB) | {"optimizer": 80 * MIB, "activations": 60 * MIB}
        memory |= {"temporary": 8 * MIB, "process": 20 * MIB, "fragments": 6 * MIB, "context": 0}
        return {
            "strategy": self.strategy,
            "step_seconds": seconds,
            "low_seconds": seconds / 1.15,
            "high_seconds": seconds * 1.15,
            "relative_error": 0.15,
            **{f"{name}_seconds": seconds * share for name, share in parts.items()},
            "communication_seconds": seconds * 0.2,
            "alpha": 0.32,
            "exposed_alpha": 0.22,
            "memory_bytes": sum(memory.values()),
            "memory": memory,
            "memory_available_bytes": 486 * MIB,
            "memory_usable_bytes": 512 * MIB,
            "fits": True,
            "samples_per_second": 64 / seconds,
            "notes": [],
            "terms": {"gradients": seconds * 0.2},
            "origins": {"flops": "measured", "bandwidth": "datasheet"},
        }

    def prediction(self) -> dict[str, Any]:
        segments = [
            {
                "name": f"blocks.{n}",
                "parameters": 1_000_000 * (1 + n % 3),
                "bytes": 4_000_000 * (1 + n % 3),
                "stage": n // 4,
            }
            for n in range(8)
        ]
        links = [{"name": "made-up link", "devices": self.workers, "bytes_per_second": 1e10, "latency_seconds": 1e-5}]
        shards = [{"parameter": "blocks.0.weight", "shape": [512, 512], "axis": "tp", "spec": "Shard(0) over tp"}]
        return {
            "strategy": self.strategy,
            "cluster": {"name": "made-up box", "devices": self.workers, "device": "Box", "links": links},
            "candidate": self.candidate(),
            "timeline": self.rows(1.0),
            "timeline_left_out": 0,
            "model": {
                "segments": segments,
                "cuts": [],
                "shards": shards,
                "whole": [{"parameter": "norm.weight", "shape": [512], "reason": "no operation allows a cut"}],
                "sharded_parameter_share": 0.9,
            },
        }

    def rows(self, stretch: float) -> list[dict[str, Any]]:
        """Return operations of all ranks: forward, backward with communication, optimizer."""
        strategy = Strategy.parse(self.strategy)
        each = max(3, self.events // self.workers)
        found: list[dict[str, Any]] = []
        for rank in range(self.workers):
            axis = next((name for name in ("tp", "fsdp", "dp") if getattr(strategy, name) > 1), "pp")
            delay = (rank % strategy.pp) * 0.06 * self.seconds
            room = (self.seconds * stretch - 2 * delay) * 0.86
            lone = room / each
            for number in range(each):
                kind = "forward" if number < each // 3 else "backward"
                microbatch = number * 4 // each
                start = delay + number * lone
                name = f"{kind[0].upper()}{microbatch}.{number}"
                row = {"process": f"rank {rank}, made up", "rank": rank, "start_seconds": start, "seconds": lone * 0.93}
                if number % 5 == 4 and self.workers > 1:
                    sent = {"stream": axis, "name": f"sum of {name}", "kind": "gradients"}
                    found.append({**row, **sent, "start_seconds": start + 0.3 * lone})
                else:
                    passed = {"stage": rank % strategy.pp, "microbatch": microbatch}
                    found.append({**row, "stream": "compute", "name": name, "kind": kind, **passed})
            done = {"stream": "compute", "name": "update", "kind": "optimizer"}
            start, took = self.seconds * stretch * 0.92, self.seconds * stretch * 0.08
            found.append(
                {"process": f"rank {rank}, made up", "rank": rank, "start_seconds": start, "seconds": took, **done}
            )
        return found

    def summary(self, folder: Path) -> dict[str, Any]:
        memory = [self.memory(rank)["peak_bytes"] for rank in range(self.workers)]
        return {
            "workload": self.workload,
            "strategy": self.strategy,
            "workers": self.workers,
            "steps": self.steps,
            "loss": None if self.nan_from else 0.9,
            "metrics": {"accuracy": 0.86},
            "samples_per_second": 64 / self.seconds,
            "step_seconds": self.seconds,
            "predicted_seconds": self.seconds * 0.93,
            "communication_share": 0.2,
            "memory_bytes": max(memory),
            "memory_bytes_by_worker": memory,
            "first_step": {"proved": True, "loss_error": 1e-7, "gradient_error": 2e-6, "seconds": 1.0, "reason": None},
            "run": str(folder),
            "notes": [],
            "reasons": {},
            "stopped": None,
        }


def what_if(strategies: Sequence[str] = ("dp={}", "fsdp={}", "tp={}"), batch: int = 64) -> dict[str, Any]:
    """Return a made-up document of the what-if panel, around four devices."""
    devices, bandwidths, batches = [1, 2, 4, 8], [0.1, 1.0, 10.0], [batch // 2, batch, batch * 2]
    cells = []
    for count in devices:
        for bandwidth in bandwidths:
            for size in batches:
                candidates = []
                for place, pattern in enumerate(strategies if count > 1 else ("single",)):
                    waits = 0.0 if count == 1 else 0.01 * (1 + place) * math.log2(count) / bandwidth
                    seconds = 0.2 * size / 64 / count + waits
                    candidates.append(
                        {
                            "strategy": pattern.format(count),
                            "step_seconds": seconds,
                            "samples_per_second": size / seconds,
                            "memory_bytes": 256 * MIB,
                            "fits": True,
                            "exposed_communication_seconds": waits,
                            "bubble_seconds": 0.0,
                        }
                    )
                rejected = [{"strategy": "pp=3", "reason": "made up"}]
                place_ = {"devices": count, "bandwidth": bandwidth, "batch": size}
                cells.append({**place_, "candidates": candidates, "rejected": rejected})
    return {
        "devices": devices,
        "bandwidth": bandwidths,
        "batch": batches,
        "here": {"devices": 4, "bandwidth": 1.0, "batch": batch},
        "cells": cells,
        "notes": [],
        "dollars_per_hour": {str(count): 2.5 * count for count in devices},
        "clusters": {str(count): f"h100x{count}" for count in devices},
        "command": "shardwise simulate image",
        "batch_setting": "batch_size",
    }


def comparison(
    folder: Path, strategies: Sequence[str] = ("single", "dp=4", "tp=4", "dp=2,pp=2,microbatches=4")
) -> Path:
    """Write the folder of a comparison: a run for each strategy, and one strategy that failed."""
    speeds = dict(zip(strategies, (0.21, 0.074, 0.083, 0.092), strict=False))
    results: list[dict[str, Any]] = []
    samples: dict[str, list[float]] = {}
    chance = random.Random(3)
    for strategy in strategies:
        seconds = speeds.get(strategy, 0.1)
        run = MadeRun(strategy=strategy, seconds=seconds).write(folder / strategy.replace("=", "").replace(",", "-"))
        samples[strategy] = [seconds * (0.97 + 0.06 * chance.random()) for _ in range(8)]
        results.append(
            {"strategy": strategy, "run": str(run), "measured_seconds": seconds, "samples_per_second": 64 / seconds}
        )
    results.append({"strategy": "fsdp=4", "run": None, "measured_seconds": None, "failed": "worker 2 died: made up"})
    hand = {"strategy": "DDP by hand, 4 workers", "workers": 4, "measured_seconds": 0.0745, "beside": "dp=4"}
    samples["DDP by hand, 4 workers"] = [0.0745 * (0.97 + 0.06 * chance.random()) for _ in range(8)]
    fastest = min(strategies, key=lambda strategy: speeds.get(strategy, 0.1))
    content = {
        "workload": "made-up",
        "results": results,
        "by_hand": [hand],
        "samples": samples,
        "rejected": [],
        "chosen": strategies[-1],
    }
    regret = speeds.get(strategies[-1], 0.1) / speeds.get(fastest, 0.1) - 1
    write(folder / "compare.json", {**content, "fastest": fastest, "regret": regret, "rounds": 8, "interrupted": False})
    write(folder / "what_if.json", what_if())
    return folder


def write(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
