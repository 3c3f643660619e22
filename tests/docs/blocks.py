"""Code blocks of Markdown pages, and how each kind is run.

    python    a script of its own; when its first line is `# name.py`, it is only saved under that name
    bash      one command a line; `make` and what sets up the machine are not run here, their names are checked
    console   `$ command`, then what it prints: a line that ends in ... is a beginning
    toml, csv   saved under the name in their first line, `# name.toml`, which is not part of them

`<!-- not run: reason -->` on the line before a block keeps it from being run.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import warm

ROOT = Path(__file__).parents[2]
_chinese = sorted((ROOT / "docs").glob("*.zh.md"))
README, TWIN = ROOT / "README.md", ROOT / "README.zh-CN.md"
TWINS = {TWIN: README, **{path: path.with_name(f"{path.name.removesuffix('.zh.md')}.md") for path in _chinese}}
"""Page in Chinese -> the page in English whose code it shares, which is the one that is run."""

PAGES = [README, *sorted(path for path in (ROOT / "docs").glob("*.md") if path not in TWINS)]
TIMEOUT_SECONDS = 300

MODULES: dict[str, tuple[str, ...]] = {
    "python": (),
    "shardwise": ("-m", "shardwise"),
    "torchrun": ("-m", "torch.distributed.run"),
}
"""Command -> the arguments of the interpreter that runs the same program."""

SHELL = set("|&;<>()$`~*?[#!{}\n")
"""A line with one of these characters needs a shell."""

_FENCE = re.compile(r"(?:<!-- not run: (?P<reason>.+?) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    code: str
    not_run: str = ""

    @property
    def name(self) -> str:
        return f"{self.page.name}:{self.line}"

    @property
    def saved_as(self) -> str:
        """File name in the first line of a block of Python, TOML or CSV, or nothing."""
        match = re.match(r"# ([\w/]+\.(\w+))\n", self.code)
        return match.group(1) if match and match.group(2) == {"python": "py"}.get(self.language, self.language) else ""


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(
            page=page,
            line=text.count("\n", 0, found.start("language")) + 1,
            language=found["language"],
            code=found["code"],
            not_run=found["reason"] or "",
        )
        for found in _FENCE.finditer(text)
    ]


def commands(block: Block) -> list[tuple[str, list[str]]]:
    """Commands of a bash or console block, each with the lines that it must print."""
    found: list[tuple[str, list[str]]] = []
    for line in block.code.replace("\\\n", " ").splitlines():
        if block.language == "bash" and line.strip() and not line.startswith("#"):
            found.append((re.sub(r"\s+# .*$", "", line), []))
        elif block.language == "console" and line.startswith("$ "):
            found.append((line[2:], []))
        elif block.language == "console" and found and line.strip():
            found[-1][1].append(line)
    return found


def run_command(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a line as a user would in a shell whose PATH has the environment's commands. Both outputs are in stdout."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "COLUMNS": "120"}
    words = shlex.split(command)
    if words[0] in MODULES and not set(command) & SHELL:
        line = [sys.executable, *MODULES[words[0]], *words[1:]]
        return warm.run(line, cwd=folder, env=environment, stderr=subprocess.STDOUT, timeout=TIMEOUT_SECONDS)
    return subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
