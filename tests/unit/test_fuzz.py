"""A thousand broken inputs of each kind: every one is taken and comes back as it is, or is refused in one line.

Seeded, so that a failure comes again; the input is in its message.
"""

from __future__ import annotations

import csv
import inspect
import io
import os
import random
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from shardwise.cluster.find import find_cluster
from shardwise.cluster.toml_reader import read_cluster
from shardwise.cluster.toml_writer import write_cluster
from shardwise.errors import LONGEST_MESSAGE, RequestError
from shardwise.options import MOST
from shardwise.planner.constraints import Constraints
from shardwise.planner.plan_file import read_plan, write_plan
from shardwise.predict.published.validate import read_rows, validate
from shardwise.strategy import Strategy
from shardwise.workload.load import load_workload
from shardwise.workload.recipes.datasets.cache import LazyArray
from shardwise.workload.recipes.datasets.text import Corpus, Span
from shardwise.workload.settings import convert

COUNT = 1000

VALUES = [
    "10000000000000000",
    "9" * 400,
    "9" * 5000,
    "-" + "9" * 400,
    "0x" + "F" * 5000,
    "1000001",
    "٤",
    "४",
    "\uff14",
    "²",
    "1_000",
    "nan",
    "-nan",
    "inf",
    "-inf",
    "-0",
    "+2",
    "02",
    "1e999",
    "1e-999",
    "1e3",
    "2.5",
    "2.0",
    "-1",
    "0",
    "1",
    "2",
    "4",
    "8",
    "",
    " ",
    '""',
    '"2"',
    "true",
    "false",
    "none",
    "[]",
    "[2]",
    "{}",
    "{ a = 2 }",
    "1979-05-27",
    "\x00",
    "\x1b[2J",
    "\x7f",
    "\n",
    "\r",
    "\u2028",
    "\udcff",
    "é",
    "a" * 100_000,
    "[" * 3000,
    "[" * 3000 + "]" * 3000,
    "{a=" * 3000,
    ".".join("a" * 3000),
    "=",
    ",",
    ":",
    "%s",
    "../..",
    "/dev/zero",
]
"""Values that stand where something else should."""


def mutated(text: str, chance: random.Random, separators: str = ",=") -> str:
    """A text with one to three things wrong with it."""
    for _ in range(chance.randint(1, 3)):
        places = [0, *(i + 1 for i, each in enumerate(text) if each in separators), len(text)]
        start = chance.choice(places)
        end = min((place for place in places if place > start), default=len(text))
        piece = text[start:end]
        value = chance.choice(VALUES)
        text = chance.choice(
            [
                text[:start] + value + piece[-1:].strip("abcdefghijklmnopqrstuvwxyz0123456789") + text[end:],
                text[:start] + value + text[start:],
                text[:start] + text[end:],
                text[:end] + piece + text[end:],
                text[:start] + piece[::-1] + text[end:],
                text[: chance.randrange(len(text) + 1)],
            ]
        )
    return text


def taken(read: Callable[[], Any], text: object) -> Any:
    """Return what was read; None where it was refused, in one line."""
    try:
        return read()
    except RequestError as error:
        message = str(error)
        assert message
        assert message.isprintable(), (text, message)
        assert len(message) <= LONGEST_MESSAGE, (text, message)
        return None
    except Exception as error:
        raise AssertionError(f"{str(text)[:300]!r} gave {type(error).__name__}: {str(error)[:300]}") from error


def inputs(seed: str, originals: list[str], separators: str = ",=") -> Iterator[str]:
    chance = random.Random(seed)
    for _ in range(COUNT):
        yield mutated(chance.choice(originals), chance, separators)


STRATEGIES = [
    "single",
    "dp=2",
    "fsdp=4,zero=2,bucket=16",
    "tp=2,sp=1,pp=2,microbatches=8,schedule=interleaved,stages=2",
    "dp=2,shares=3:1,precision=bf16",
    "pp=2,speeds=3:1,recompute=1/2",
    "dp=2,pp=2,outermost=pp,recompute=selective",
    "fsdp=2,offload=1",
]


def check_sound(strategy: Strategy) -> None:
    assert Strategy.parse(str(strategy)) == strategy
    assert 1 <= strategy.workers <= MOST
    assert str(strategy).isascii()


def test_strategies() -> None:
    accepted = [
        strategy
        for text in inputs("strategies", STRATEGIES, ",=:/")
        if (strategy := taken(lambda text=text: Strategy.parse(text), text)) is not None  # type: ignore[misc]
    ]
    assert 10 < len(accepted) < COUNT / 2
    for strategy in accepted:
        check_sound(strategy)


def test_no_odd_number_is_a_degree() -> None:
    for text in VALUES:
        strategy = taken(lambda text=text: Strategy.parse(f"dp={text}"), text)  # type: ignore[misc]
        assert (strategy is not None) == (text in ("1", "2", "4", "8")), text


def test_no_odd_value_is_a_degree() -> None:
    odd: list[Any] = [True, 2.0, "2", None, 10**16, 10**400, 10**5000, float("nan"), [2]]
    for value in odd:
        assert taken(lambda value=value: Strategy(dp=value), type(value)) is None  # type: ignore[misc]


def test_wishes() -> None:
    for text in inputs("wishes", ["tp=8", "schedule=gpipe", "recompute=1/2", "zero=2"]):
        taken(lambda text=text: Constraints.parse(fix=[text]), text)  # type: ignore[misc]
        taken(lambda text=text: Constraints.parse(forbid=[text]), text)  # type: ignore[misc]
        taken(lambda text=text: Constraints.parse(max_memory=text), text)  # type: ignore[misc]


def test_settings() -> None:
    def function(
        whole: int = 2,
        number: float = 0.5,
        flag: bool = False,
        maybe: int | None = None,
        choice: Literal["a", "b"] = "a",
    ) -> None: ...

    parameters = {
        name: parameter.replace(annotation=kind)
        for (name, parameter), kind in zip(
            inspect.signature(function).parameters.items(),
            (int, float, bool, int | None, Literal["a", "b"]),
            strict=True,
        )
    }
    for text in [*VALUES, *inputs("settings", ["12", "-3", "0.5", "1e-3", "true", "none", "a"], ".e-")]:
        for name, parameter in parameters.items():
            value = taken(lambda text=text, parameter=parameter: convert(text, parameter), text)  # type: ignore[misc]
            if value is not None:
                assert convert(str(value), parameter) == value, (name, text)


@pytest.fixture
def _no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """A corpus that is there at once, for sizes of which no model is built."""
    span = Span(LazyArray(lambda: pytest.fail("the text was read")), 0, 10**9)
    corpus = Corpus(span, span, 256, "byte")
    monkeypatch.setattr("shardwise.workload.recipes.gpt.standard_library", lambda: corpus)


SIZES = [
    "gpt:layers=96,hidden=12288,heads=96",
    "gpt:layers=2,hidden=64,heads=2,kv_heads=1,ffn=96,tied=true,sequence=64",
]


@pytest.mark.usefixtures("_no_text")
def test_sizes() -> None:
    accepted = 0
    for text in inputs(
        "sizes", [*SIZES, "gpt:layers=1,hidden=8,heads=1,batch_size=4,learning_rate=1e-3,clip_norm=none"]
    ):
        workload = taken(lambda text=text: load_workload(text), text)  # type: ignore[misc]
        accepted += workload is not None
        if workload is not None:
            assert 1 <= workload.batch_size <= 10**7
            assert str(text).isprintable()
    assert 10 < accepted < COUNT / 2


CLUSTERS = ["h100x8", "a100x1024", "dgx-a100", "p5x16", "rtx4090x2", "NVIDIA H100 SXM x 8", "h100 x8"]
SPELLINGS = [
    "h100x-8",
    "h100x1" + "0" * 30,
    "h100x1e3",
    "h100x٨",
    "h100x8.0",
    "h100x+8",
    "h100x08",
    "h100x0",
    "h100x",
    "x8",
]


def test_cluster_names() -> None:
    for text in [*VALUES, *SPELLINGS, *inputs("clusters", CLUSTERS, "x- ")]:
        if os.path.isfile(text) or text.endswith(".toml"):
            continue
        cluster = taken(lambda text=text: find_cluster(text), text)  # type: ignore[misc]
        assert cluster is None or (1 <= cluster.size <= MOST and text.isascii()), text
    for text in SPELLINGS:
        assert taken(lambda text=text: find_cluster(text), text) is None, text  # type: ignore[misc]


PLAN = """\
version = 1
workload = "gpt:layers=2,hidden=64,heads=2"
cluster = "h100x2"
strategy = "pp=2,microbatches=4"
cuts = [[0], [12, 15]]

[settings]
batch_size = "8"
tied = true

[prediction]
step_seconds = 0.29
memory_bytes = 1000000

[made_with]
torch = "2.13.0"
"""

BOX = """\
name = "box"
[devices.box]
name = "Box"
kind = "cpu"
memory_bytes = 10000000000
memory_bandwidth = 1e10
cores = 2
launch_seconds = 1e-5
flops = { float32 = 1e11 }
shared = { 2 = 1.5 }
[[devices.box.curves]]
kind = "matmul"
dtype = "float32"
samples = [[1, 64, 64, 64, 1e-5, 0.1]]
[[nodes]]
device = "box"
devices = 2
count = 1
[[levels]]
name = "loopback"
span = 2
bandwidth = 1e9
latency = 1e-5
[[collectives]]
operation = "all_reduce"
ranks = 2
nodes = 1
samples = [[4096, 1e-4, 0.1]]
"""


def files(seed: str, text: str, separators: str = "\n=[],") -> Iterator[bytes]:
    """Files with something wrong, among them some that are no text."""
    chance = random.Random(seed)
    for broken in inputs(seed, [text], separators):
        content = broken.encode("utf-8", "surrogatepass" if chance.random() < 0.5 else "replace")
        if chance.random() < 0.05:
            place = chance.randrange(len(content) + 1)
            content = content[:place] + bytes([chance.randrange(256)]) + content[place:]
        yield content


def test_plan_files(tmp_path: Path) -> None:
    path, again, accepted = tmp_path / "plan.toml", tmp_path / "again.toml", 0
    for content in files("plans", PLAN):
        path.write_bytes(content)
        plan = taken(lambda: read_plan(path), content)
        if plan is not None:
            accepted += 1
            check_sound(plan.strategy)
            write_plan(again, plan)
            assert read_plan(again) == plan, content
    assert 10 < accepted < COUNT / 2


def test_cluster_files(tmp_path: Path) -> None:
    path, again, accepted = tmp_path / "cluster.toml", tmp_path / "again.toml", 0
    for content in files("cluster files", BOX):
        path.write_bytes(content)
        cluster = taken(lambda: read_cluster(path), content)
        if cluster is not None:
            accepted += 1
            assert 1 <= cluster.size <= MOST
            write_cluster(cluster, again)
            assert read_cluster(again) == cluster, content
    assert 10 < accepted < COUNT / 2


@pytest.mark.parametrize("original", [PLAN, BOX], ids=["plan", "cluster"])
def test_every_field_with_every_value(original: str, tmp_path: Path) -> None:
    path = tmp_path / "file.toml"
    read: Callable[[Path], object] = read_plan if original is PLAN else read_cluster
    lines = original.splitlines()
    for number, line in enumerate(lines):
        key, equals, _ = line.partition(" = ")
        for value in [*VALUES, "0x" + "F" * 17, "9223372036854775808", "[[[[" * 20 + "]]]]" * 20] if equals else ():
            text = "\n".join([*lines[:number], f"{key} = {value}", *lines[number + 1 :]])
            path.write_bytes(text.encode("utf-8", "surrogatepass"))
            taken(lambda: read(path), (line, value))


COLUMNS = (
    "group,source,model,params_b,layers,hidden,heads,kv_heads,ffn,vocab,seq_len,gpu,n_gpus,gpus_per_node,interconnect,"
    "tp,pp,dp,cp,vpp,schedule,zero_fsdp,micro_batch,global_batch,grad_accum,recompute,precision,compile,"
    "step_time_s,peak_mem_gib,notes"
).split(",")
ROW = (
    "a,b,llama-7b,6.7,32,4096,32,32,11008,32000,4096,A100-80GB,64,8,8x200Gb HDR IB,"
    "2,2,16,1,1,1f1b,zero-1,1,512,32,none,bf16,no,5.5,40,none"
).split(",")
CELLS = [
    *VALUES,
    "1,000",
    "1e12",
    "1e300",
    "NVL99999999999",
    "nvlink (99999999999-link)",
    "HSDP 99999999",
    "9" * 300 + "Gbps",
]


def test_rows(tmp_path: Path) -> None:
    path, chance = tmp_path / "runs.csv", random.Random("rows")
    rows = [ROW]
    for _ in range(COUNT):
        row = list(ROW)
        for _ in range(chance.randint(1, 3)):
            row[chance.randrange(len(row))] = chance.choice(CELLS)
        rows.append(row)
    text = io.StringIO()
    csv.writer(text).writerows([COLUMNS, *rows])
    path.write_bytes(text.getvalue().encode("utf-8", "replace"))
    document = taken(lambda: validate(path), "rows")
    assert document is not None
    assert document["rows"] + document["skipped"] >= COUNT
    assert document["rows"] > COUNT / 20
    for skipped in document["skipped_rows"]:
        assert skipped["reason"].isprintable()
        assert len(skipped["reason"]) <= LONGEST_MESSAGE
    for row in document["predictions"]:
        assert 0 < row["predicted_seconds"] < float("inf"), row


def test_tables(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    for content in files("tables", f"{','.join(COLUMNS)}\n{','.join(ROW)}\n", "\n,"):
        path.write_bytes(content)
        taken(lambda: read_rows(path), content)


@pytest.mark.parametrize("read", [read_plan, read_cluster, read_rows], ids=["plan", "cluster", "rows"])
def test_what_is_no_file(read: Callable[[Path], object], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "large").open("wb") as large:
        large.truncate(1 << 40)
    (tmp_path / "long").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        for name in ("pipe", "socket", "large", "long", ".", "none", "n\0l", "x" * 300, "line\nline"):
            assert taken(lambda name=name: read(tmp_path / name), name) is None, name  # type: ignore[misc]
