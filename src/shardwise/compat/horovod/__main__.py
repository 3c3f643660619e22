"""Command `python -m shardwise.compat.horovod -np N script.py ...`: a Horovod script on N local workers."""

from __future__ import annotations

import argparse
import sys

from shardwise.compat.horovod.launching import run_script
from shardwise.errors import ShardwiseError


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status; errors are one line."""
    parser = argparse.ArgumentParser(prog="python -m shardwise.compat.horovod", description=__doc__)
    parser.add_argument("-np", "--num-proc", type=int, default=1, metavar="N", help="number of local workers")
    parser.add_argument("script", help="Python file to run")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    asked = parser.parse_args(arguments)
    try:
        run_script(asked.script, asked.arguments, asked.num_proc)
    except ShardwiseError as error:
        sys.stderr.write(f"shardwise: {error}\n")
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
