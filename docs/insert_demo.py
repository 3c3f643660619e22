"""Put the output of `make demo` between the demo markers of the given pages: figures come from the program only.

python docs/insert_demo.py OUTPUT PAGE...
"""

from __future__ import annotations

import os
import platform
import re
import sys
from importlib.metadata import version
from pathlib import Path

MARKERS = re.compile(r"(?<=^)(<!-- demo: start [^\n]*-->\n).*?(<!-- demo: end -->)", re.MULTILINE | re.DOTALL)


def main(output: Path, pages: list[Path]) -> None:
    table = output.read_text().strip()
    machine = f"{os.cpu_count()} cores, Python {platform.python_version()}, torch {version('torch')}"
    for page in pages:
        text, count = MARKERS.subn(lambda m: f"{m[1]}\n```text\n{table}\n\n{machine}\n```\n\n{m[2]}", page.read_text())
        if count != 1:
            raise SystemExit(f"{page} has {count} pairs of demo markers, must have one")
        page.write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(page) for page in sys.argv[2:]])
