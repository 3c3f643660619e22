"""Collectives over two hosts of two workers: in layers, and by gloo over all workers at once, in turns.

    python -m benchmarks.layers [--rates BITS_PER_SECOND ...] [--rounds N]

The hosts are namespaces of this machine with a shaped link between them (`benchmarks.hosts`), so it needs root. `times`
is how many times faster layers are; `most` is the ratio of the bytes that leave a host, which a slow link approaches:
gloo's reduce-scatter sends as much as its all-reduce.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness import alternate, environment, median, record
from benchmarks.hosts import HOSTS, hosts, run_on_hosts
from benchmarks.transport import call
from shardwise.launch.shared_memory.choice import GLOO

RATES = (1e8, 1e9)
SIZES = (64 * 2**10, 2**20, 8 * 2**20)
PER_HOST = 2
MOST = {"all_reduce": 1.5, "reduce_scatter": 3.0, "all_gather": 1.5}


def measure(rounds: int, out: Path) -> None:
    """Write the seconds of (layers, gloo) in each round, by operation and bytes. Collective."""
    from shardwise.launch.join import join_launcher

    join_launcher()
    import torch.distributed as dist

    from shardwise.launch.shared_memory.layered_group import LayeredGroup
    from shardwise.launch.shared_memory.registration import register

    layered, flat = dist.new_group(backend=register()), dist.new_group(backend=GLOO)
    assert isinstance(layered, LayeredGroup), "the workers of a host do not share memory"
    found = {}
    for size in SIZES:
        for operation in MOST:
            steps = [call(operation, size, group) for group in (layered, flat)]
            found[f"{operation} {size}"] = alternate(steps, rounds if size < 2**22 else max(3, rounds // 4), warmup=1)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found))
    dist.barrier()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.out is not None:
        measure(options.rounds, options.out)
        return
    before = environment(threads=None)
    rows: list[dict[str, Any]] = []
    everything = {}
    for rate in options.rates:
        with hosts(rate), tempfile.TemporaryDirectory() as folder:
            out = Path(folder, "found.json")
            arguments = ["--rounds", str(options.rounds), "--out", str(out)]
            if run_on_hosts("benchmarks.layers", arguments, PER_HOST, {}):
                raise SystemExit("a worker failed")
            found = everything[f"{rate:g} bit/s"] = json.loads(out.read_text())
        for name, rounds in found.items():
            layered, flat = (1e3 * median([each[kind] for each in rounds]) for kind in (0, 1))
            most = MOST[name.split()[0]]
            rows.append(
                {
                    "what": name,
                    "Mb/s": rate / 1e6,
                    "ms layers": layered,
                    "ms gloo": flat,
                    "times": flat / layered,
                    "most": most,
                }
            )
    record("layers", {"rounds": options.rounds, "hosts": HOSTS, "workers": HOSTS * PER_HOST}, rows, everything, before)


if __name__ == "__main__":
    main()
