"""Commands and code of README and docs are run as shown, blocks of a page in order in one folder."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from blocks import PAGES, ROOT, TWIN, TWINS, Block, blocks, commands, run_command

LANGUAGES = ("python", "bash", "console", "toml", "csv")
RUN = [block for page in PAGES for block in blocks(page) if block.language in LANGUAGES]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Path]:
    return {page: tmp_path_factory.mktemp(page.stem) for page in PAGES}


@pytest.mark.parametrize("block", RUN, ids=lambda block: block.name)
def test_block(block: Block, folders: dict[Path, Path]) -> None:
    if block.not_run:
        pytest.skip(block.not_run)
    folder = folders[block.page]
    if block.language == "python":
        run_python(block, folder)
    elif block.language in ("toml", "csv"):
        assert block.saved_as, "say how the file is called, in the first line"
        (folder / block.saved_as).write_text(block.code.partition("\n")[2])
    else:
        run_shell(block, folder)


def run_python(block: Block, folder: Path) -> None:
    path = folder / (block.saved_as or f"block_{block.line}.py")
    path.write_text(block.code)
    if not block.saved_as:
        result = run_command(f"python {path.name}", folder)
        assert result.returncode == 0, result.stdout


def run_shell(block: Block, folder: Path) -> None:
    for command, expected in commands(block):
        if command.startswith("make"):
            targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert command.split()[1] in targets
            continue
        result = run_command(command, folder)
        if block.language == "bash":
            assert result.returncode == 0, f"{command}\n{result.stdout}"
        if any(line.startswith("shardwise: ") for line in expected):
            assert result.returncode == 2, f"{command} ends with {result.returncode}"
        for line in expected:
            shown = line.removesuffix("...").rstrip()
            assert shown in result.stdout, f"{command} does not print {shown!r} but\n{result.stdout}"


def test_there_is_something_to_run() -> None:
    assert any(block.language == "python" for block in RUN)
    assert any(block.language == "bash" for block in RUN)


@pytest.mark.parametrize("twin", TWINS, ids=lambda page: page.name)
def test_twin_has_the_same_code(twin: Path) -> None:
    def code(page: Path) -> list[str]:
        return [re.sub(r"#.*", "#", block.code) for block in blocks(page)]

    assert code(twin) == code(TWINS[twin])


@pytest.mark.parametrize("twin", TWINS, ids=lambda page: page.name)
def test_twin_has_the_same_sections(twin: Path) -> None:
    def levels(page: Path) -> list[str]:
        prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        return re.findall(r"^(#+) ", prose, re.MULTILINE)

    assert levels(twin) == levels(TWINS[twin])


@pytest.mark.parametrize("page", [*PAGES, *TWINS, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.fixture(scope="module", autouse=True)
def _nothing_left(folders: dict[Path, Path]) -> Iterator[None]:
    yield
    for folder in folders.values():
        shutil.rmtree(folder, ignore_errors=True)


def test_both_pages_show_what_the_demo_printed() -> None:
    def shown(page: Path) -> str:
        found = re.search(r"demo: start [^\n]*\n(.*?)<!-- demo: end", page.read_text(), re.DOTALL)
        return found[1] if found else ""

    strategies = re.search(r"^STRATEGIES := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert strategies
    named = [strategy for strategy in strategies[1].split() if strategy != "auto"]
    assert all(f"\n{strategy} " in shown(PAGES[0]) for strategy in named)
    assert ("is what train chooses" in shown(PAGES[0])) == ("auto" in strategies[1].split())
    assert shown(TWIN) == shown(PAGES[0])
