"""Draw docs/pictures/*.svg: what each worker holds and does under each kind of parallelism, one picture a page.

python docs/draw_pictures.py [FOLDER]

Everything in a picture is read from the program that trains and from its prediction:

    what a worker holds     the layouts of the program, built for a rank without memory (`predict.dry_run.fakes`)
    which samples           `workload.data.cut_batch`
    one step                the played timeline of the step program (`predict.timeline`)
    memory                  the closed form, for each pipeline worker (`predict.closed_form`)

The pages are in two languages, and so are the pictures. Colours are those of Okabe and Ito (2008), which colour-blind
readers can tell apart. A picture brings its own background, light or dark as the reader's system asks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from math import floor, log10
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from shardwise.cluster.find import find_cluster
from shardwise.parallel.mesh import random_state_kept
from shardwise.parallel.program import Program
from shardwise.parallel.state.layout import Layout
from shardwise.predict.closed_form.step_time import costs_of
from shardwise.predict.dry_run.fakes import ModelWithoutValues, fake_workers
from shardwise.predict.prediction import Memory, categories
from shardwise.predict.profile.meta_model import builds
from shardwise.predict.profile.source import ProfileSource
from shardwise.predict.simulate import played, profiles_on, simulate
from shardwise.splitting.balance import Cuts
from shardwise.strategy import Strategy
from shardwise.units import format_bytes, format_seconds
from shardwise.workload.data import cut_batch
from shardwise.workload.load import load_workload
from shardwise.workload.workload import Workload

FOLDER = Path(__file__).parent / "pictures"

MODEL = "gpt:layers=8,hidden=1024,heads=16,vocabulary=32000,sequence=1024,batch_size=32"
CLUSTER = "a100-80x8"

PICTURES = {
    "data-parallel": "dp=4",
    "sharded": "fsdp=4",
    "tensor-parallel": "tp=4",
    "pipeline": "pp=4,microbatches=8",
    "hybrid": "dp=2,tp=2,pp=2,microbatches=4",
}
"""Page -> the strategy that its picture shows, on the model and the cluster above."""

WORDS: dict[str, dict[str, str]] = {
    "": {
        "holds": "What each worker holds and computes: coloured is what is there",
        "worker": "worker {}",
        "samples": "samples",
        "embedding": "embedding",
        "block": "block {}",
        "output": "output",
        "step": "One step of {}, predicted",
        "each": "each worker",
        "memory": "Memory at the peak of the step",
        "alone": "one worker alone",
        "forward": "forward",
        "backward": "backward",
        "communication": "communication",
        "optimizer": "optimizer",
        "parameters": "parameters",
        "gradients": "gradients",
        "state": "optimizer state",
        "activations": "activations",
        "rest": "the rest",
        "about": "{strategy}: for each worker the parts of the model that it holds and the samples that it computes, "
        "the timeline of one step, and its memory",
    },
    ".zh": {
        "holds": "每个工作进程持有和计算的部分：着色处即为所持有",
        "worker": "工作进程 {}",
        "samples": "样本",
        "embedding": "嵌入层",
        "block": "第 {} 层",
        "output": "输出层",
        "step": "一步训练（预测）：{}",
        "each": "每个工作进程",
        "memory": "一步之中的内存峰值",
        "alone": "单个工作进程",
        "forward": "前向",
        "backward": "反向",
        "communication": "通信",
        "optimizer": "优化器",
        "parameters": "参数",
        "gradients": "梯度",
        "state": "优化器状态",
        "activations": "激活",
        "rest": "其余",
        "about": "{strategy}：每个工作进程持有模型的哪些部分、计算哪些样本，一步训练的时间线，以及内存",
    },
}
"""Suffix of the file -> the words in its language."""

STYLE = """
text{font-family:system-ui,-apple-system,"Segoe UI","Noto Sans CJK SC","PingFang SC","Microsoft YaHei",sans-serif;
font-size:13px;fill:#1b1f24}
.head{font-size:15px;font-weight:600}.end{text-anchor:end}.mid{text-anchor:middle}.small{font-size:12px}
.paper{fill:#fff}.cell{fill:#eceff2}.line{stroke:#9aa4ae;fill:none}
.held{fill:#0072b2}.forward{fill:#0072b2}.backward{fill:#e69f00}.communication{fill:#cc79a7}.optimizer{fill:#009e73}
.parameters{fill:#0072b2}.gradients{fill:#e69f00}.state{fill:#009e73}.activations{fill:#56b4e9}.rest{fill:#9aa4ae}
@media (prefers-color-scheme:dark){text{fill:#e8eaed}.paper{fill:#1e2129}.cell{fill:#333a45}.line{stroke:#6b7685}
.held,.forward,.parameters{fill:#4aa3df}.activations{fill:#cfe8fb}}
"""

WIDTH, LEFT, RIGHT = 880, 136, 16
"""Pixels of the picture, left of its panels and right of them."""

ROW, GAP, HEAD = 17, 26, 30
"""Pixels of a row of the panels, between panels, and of a panel's title."""

COMMUNICATIONS = ("parameters", "gradients", "exchanges", "message", "report")
"""Kinds of operations of the timeline that send or receive."""


@dataclass(frozen=True)
class Shown:
    """One strategy with all that its picture shows.

    Attributes:
        strategy: the strategy, with its number of microbatches.
        held: for each rank, the layout of each parameter that it holds, by name.
        shapes: shape of each parameter of the plain model, by name.
        samples: for each rank, the positions in the global batch of the samples that go through it.
        batch: samples of the global batch.
        rows: operations of one step, as `Timeline.document` gives them.
        seconds: seconds of the step.
        alone: memory of one worker with the whole batch.
        memory: memory of each pipeline worker.
    """

    strategy: Strategy
    held: tuple[Mapping[str, Layout], ...]
    shapes: Mapping[str, tuple[int, ...]]
    samples: tuple[frozenset[int], ...]
    batch: int
    rows: Sequence[Mapping[str, Any]]
    seconds: float
    alone: Memory
    memory: tuple[Memory, ...]


def main(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    workload = load_workload(MODEL)
    profiles = profiles_on(workload, find_cluster(CLUSTER))
    whole = layouts(workload, Strategy(), 0, None)
    for name, text in PICTURES.items():
        shown = look(profiles, Strategy.parse(text), whole)
        for suffix, words in WORDS.items():
            (folder / f"{name}{suffix}.svg").write_text(draw(shown, text, words))


# ---- what the program does ------------------------------------------------------------------------------------------


def look(profiles: ProfileSource, asked: Strategy, whole: Mapping[str, Layout]) -> Shown:
    """Read from the program and its prediction what a picture of a strategy shows.

    Replicas of `dp` hold the same, so that only the first one is built. `whole` has the layouts of one worker alone.
    """
    workload, cluster = profiles.workload, find_cluster(CLUSTER)
    strategy = asked.for_batch(workload.batch_size)
    costs = costs_of(profiles.of(strategy), strategy, cluster)
    cuts = costs.parts.cuts if strategy.pp > 1 else None
    step = played(profiles, strategy, cluster, {})
    cells = cut_batch(workload.batch_size, strategy.parts, strategy.microbatches, uniform=not strategy.runs_module)
    shares = [frozenset(sample for row in cells for sample in row[replica]) for replica in range(strategy.replicas)]
    held = [layouts(workload, strategy, rank, cuts) for rank in range(strategy.workers // strategy.dp)]
    return Shown(
        strategy,
        tuple(held * strategy.dp),
        {name: layout.shape for name, layout in whole.items()},
        tuple(shares[replica_of(strategy, rank)] for rank in range(strategy.workers)),
        workload.batch_size,
        step.document(),
        step.prediction.step_seconds,
        simulate(profiles, Strategy(), cluster).memory,
        tuple(costs.memory_at(worker) for worker in costs.parts.workers),
    )


def layouts(workload: Workload, strategy: Strategy, rank: int, cuts: Cuts | None) -> dict[str, Layout]:
    """Build the program of one rank without memory, and return the layout of each parameter that it holds."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model = ModelWithoutValues(lambda: next(builds(workload)).module)
    with fake_workers(rank, strategy.workers), random_state_kept():
        program = Program.build(
            replace(workload, model=model, weights=None),
            strategy,
            device=torch.device("cpu"),
            cuts=cuts,
            allocating=lambda: mode,
        )
        return {name: placement.layout for name, placement in program.engine.held.items()}


def replica_of(strategy: Strategy, rank: int) -> int:
    """Return the index of the share of the batch that a rank computes."""
    return next(
        row * strategy.fsdp + column
        for row in range(strategy.dp)
        for column in range(strategy.fsdp)
        for stage in range(strategy.pp)
        for shard in range(strategy.tp)
        if strategy.rank(dp=row, fsdp=column, pp=stage, tp=shard) == rank
    )


# ---- the picture ----------------------------------------------------------------------------------------------------


def draw(shown: Shown, strategy: str, words: Mapping[str, str]) -> str:
    """Draw the picture of a strategy as an SVG document, in the language of `words`."""
    panels, top = [], 12.0
    for panel in (_held, _step, _memory):
        lines, height = panel(shown, strategy, words)
        panels += [f'<g transform="translate(0 {top:g})">', *lines, "</g>"]
        top += height + GAP
    height = round(top - GAP + 12)
    about = escape(words["about"].format(strategy=strategy))
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
            'role="img" aria-labelledby="about">',
            f'<title id="about">{about}</title>',
            f"<style>{STYLE}</style>",
            f'<rect class="paper" width="{WIDTH}" height="{height}" rx="6"/>',
            *panels,
            "</svg>\n",
        ]
    )


Panel = tuple[list[str], float]
"""Lines of SVG and the height in pixels of a part of the picture."""


def _held(shown: Shown, _: str, words: Mapping[str, str]) -> Panel:
    """Draw the matrices of the model for each worker, filled where the worker holds them, and its samples."""
    ranks = shown.strategy.workers
    wide = (WIDTH - LEFT - RIGHT) / ranks
    layers = _layers(shown.shapes)
    lines = [_text(LEFT, 15, words["holds"], "head"), _text(LEFT - 10, HEAD + ROW + 13, words["samples"], "end")]
    top = HEAD + ROW
    for rank in range(ranks):
        left = LEFT + rank * wide
        lines.append(_text(left, HEAD + 12, words["worker"].format(rank), "small"))
        lines += _samples(shown, rank, left, top + 3, wide - 14)
    for number, (layer, names) in enumerate(layers):
        y = top + (number + 1) * ROW + 4
        kind, _, index = layer.partition(" ")
        lines.append(_text(LEFT - 10, y + 12, words[kind].format(int(index) + 1 if index else ""), "end"))
        for rank in range(ranks):
            each = (wide - 14) / len(names)
            for place, name in enumerate(names):
                box = (LEFT + rank * wide + place * each, y, each - 2, ROW - 3)
                lines += _matrix(shown.shapes[name], shown.held[rank].get(name), box)
    return lines, top + (len(layers) + 1) * ROW + 4


def _layers(shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[str, list[str]]]:
    """Return (layer, names of its matrices) in the model's order; a layer is `embedding`, `block N` or `output`."""
    found: dict[str, list[str]] = {}
    matrices = [name for name, shape in shapes.items() if len(shape) == 2]
    for name in matrices:
        index = next((part for part in name.split(".") if part.isdigit()), None)
        end = "embedding" if name == matrices[0] else "output"
        found.setdefault(end if index is None else f"block {index}", []).append(name)
    return list(found.items())


def _samples(shown: Shown, rank: int, left: float, top: float, wide: float) -> Iterable[str]:
    each = wide / shown.batch
    for sample in range(shown.batch):
        kind = "held" if sample in shown.samples[rank] else "cell"
        yield _box(left + sample * each, top, each * 0.7, ROW - 6, kind)


def _matrix(shape: tuple[int, ...], layout: Layout | None, box: tuple[float, float, float, float]) -> Iterable[str]:
    """Draw a matrix as a box, and in it, to scale, the tiles that a worker holds: rows downwards, columns across."""
    left, top, wide, high = box
    yield _box(left, top, wide, high, "cell")
    for tile in layout.tiles if layout else ():
        (row, column), (rows, columns) = tile.offsets, tile.sizes
        x, y = left + wide * column / shape[1], top + high * row / shape[0]
        yield _box(x, y, wide * columns / shape[1], high * rows / shape[0], "held")


def _step(shown: Shown, strategy: str, words: Mapping[str, str]) -> Panel:
    """Draw the operations of one step: for each simulated worker what it computes, and below what it sends."""
    ranks = sorted({row["rank"] for row in shown.rows})
    span = WIDTH - LEFT - RIGHT
    scale = span / shown.seconds
    lines = [_text(LEFT, 15, words["step"].format(strategy), "head")]
    lines += _legend(("forward", "backward", "communication", "optimizer"), words, HEAD)
    top = HEAD + ROW + 6.0
    for number, rank in enumerate(ranks):
        y = top + number * (ROW * 2 + 4)
        one = shown.strategy.pp == 1
        lines.append(_text(LEFT - 10, y + 17, words["each"] if one else words["worker"].format(rank), "end"))
        lines.append(_box(LEFT, y, span, ROW - 2, "cell"))
        lines.append(_box(LEFT, y + ROW - 1, span, ROW - 6, "cell"))
        for row in shown.rows:
            if row["rank"] != rank:
                continue
            sends = row["kind"] in COMMUNICATIONS
            kind = "communication" if sends else row["kind"].split()[0]
            at, wide = LEFT + row["start_seconds"] * scale, row["seconds"] * scale
            lines.append(_box(at, y + (ROW - 1 if sends else 0), max(wide - 0.4, 0.3), ROW - (6 if sends else 2), kind))
    bottom = top + len(ranks) * (ROW * 2 + 4)
    return lines + list(_axis(shown.seconds, scale, bottom)), bottom + 22


def _axis(seconds: float, scale: float, y: float) -> Iterable[str]:
    """Draw a time axis with about six labels at round numbers."""
    rough = seconds / 6
    power = 10.0 ** floor(log10(rough))
    step = next(times * power for times in (1, 2, 5, 10) if times * power >= rough)
    yield f'<path class="line" d="M{LEFT} {y:g}H{WIDTH - RIGHT}"/>'
    for number in range(int(seconds / step) + 1):
        x = LEFT + number * step * scale
        yield f'<path class="line" d="M{x:.1f} {y:g}v4"/>'
        label = format_seconds(number * step) if number else "0"
        yield _text(x, y + 18, label, "small mid" if number else "small")


def _memory(shown: Shown, _: str, words: Mapping[str, str]) -> Panel:
    """Draw the memory of one worker alone and of the workers of the strategy, by category."""
    labelled = [(words["alone"], shown.alone)]
    if shown.strategy.pp == 1:
        labelled.append((words["each"], shown.memory[0]))
    else:
        first = [shown.strategy.rank(pp=stage) for stage in range(shown.strategy.pp)]
        labelled += [(words["worker"].format(rank), memory) for rank, memory in zip(first, shown.memory, strict=True)]
    scale = (WIDTH - LEFT - RIGHT - 80) / max(memory.total for _, memory in labelled)
    lines = [_text(LEFT, 15, words["memory"], "head")]
    lines += _legend(("parameters", "gradients", "state", "activations", "rest"), words, HEAD)
    top = HEAD + ROW + 6.0
    for number, (label, memory) in enumerate(labelled):
        y, left = top + number * (ROW + 4), float(LEFT)
        lines.append(_text(LEFT - 10, y + 13, label, "end"))
        for kind, size in _categories(memory).items():
            lines.append(_box(left, y, size * scale, ROW, kind))
            left += size * scale
        lines.append(_text(left + 6, y + 13, format_bytes(memory.total), "small"))
    return lines, top + len(labelled) * (ROW + 4)


def _categories(memory: Memory) -> dict[str, int]:
    """Return the bytes of the categories that a picture tells apart."""
    sizes = categories(memory)
    shown = {"parameters": "parameters", "gradients": "gradients", "state": "optimizer", "activations": "activations"}
    named = {kind: sizes[name] for kind, name in shown.items()}
    return {**named, "rest": memory.total - sum(named.values())}


def _legend(kinds: Sequence[str], words: Mapping[str, str], y: float) -> Iterable[str]:
    left = float(LEFT)
    for kind in kinds:
        yield _box(left, y, 12, 12, kind)
        yield _text(left + 17, y + 11, words[kind], "small")
        left += 46 + sum(12.5 if ord(letter) > 0x2E80 else 6.6 for letter in words[kind])


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _box(x: float, y: float, wide: float, high: float, kind: str) -> str:
    return f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{high:.1f}"/>'


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
