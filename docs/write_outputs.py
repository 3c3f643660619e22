"""Put what commands print into the pages of docs/: figures come from the program only.

python docs/write_outputs.py [PAGE ...]

A console block after the line `MARKER` gets the output of its commands. The files that a page names in the first lines
of its blocks (`# name.py`) are there when they run. The page's twin in Chinese, PAGE.zh.md, gets the same blocks.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
MARKER = "<!-- output: python docs/write_outputs.py writes it -->"
OUTPUT = re.compile(rf"(?<=^{MARKER}\n)```console\n.*?^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"^```(?:python|toml|csv)\n# (?P<name>\w+\.\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


def main(pages: list[Path]) -> None:
    for page in pages:
        text = page.read_text()
        written = [with_output(block, text) for block in OUTPUT.findall(text)]
        for path in (page, page.with_suffix(".zh.md")):
            if path.exists() and written:
                path.write_text(replaced(path, written))


def replaced(page: Path, blocks: list[str]) -> str:
    """Return the text of a page with these console blocks in place of its own."""
    text, rest = page.read_text(), list(blocks)
    if len(OUTPUT.findall(text)) != len(blocks):
        raise SystemExit(f"{page} must have {len(blocks)} blocks that are written")
    return OUTPUT.sub(lambda _: rest.pop(0), text)


def with_output(block: str, page: str) -> str:
    """Return a console block with the output of its commands, run beside the files of its page."""
    commands = [line for line in block.splitlines() if line.startswith("$ ")]
    with tempfile.TemporaryDirectory() as folder:
        for found in FILE.finditer(page):
            Path(folder, found["name"]).write_text(found["code"])
        lines = [line for command in commands for line in (command, *output(command[2:], folder))]
    return "\n".join(["```console", *lines, "```"])


def output(command: str, folder: str) -> list[str]:
    """Run a command in a folder and return the lines that it prints, without those that are empty."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path}
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    return [line.rstrip() for line in done.stdout.splitlines() if line.strip()]


if __name__ == "__main__":
    names = [Path(name) for name in sys.argv[1:]] or sorted(HERE.glob("*.md"))
    main([page for page in names if not page.name.endswith(".zh.md")])
