"""The site of docs/: it builds without a warning and without a network, and its pictures are the program's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
from blocks import ROOT, TWINS

import shardwise

DOCS = ROOT / "docs"
DRAWN = DOCS / "pictures"
IN_CHINESE = (
    "index",
    "first-ten-minutes",
    "data-parallel",
    "sharded",
    "tensor-parallel",
    "pipeline",
    "hybrid",
    "reading-a-report",
    "troubleshooting",
)
NOWHERE = "http://127.0.0.1:9"
"""Address of a proxy that does not exist: a build that loads something fails."""

LOADED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src", "video": "src"}
"""Element -> the attribute whose address a browser loads by itself."""

NOT_LOADED = {"canonical", "alternate", "next", "prev", "author", "license"}
"""Kinds of `link` that a browser does not load."""


class Loaded(HTMLParser):
    """Collects the addresses that a page loads from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.elsewhere: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        address = given.get(LOADED.get(tag, "")) or ""
        if re.match(r"(https?:)?//", address) and given.get("rel") not in NOT_LOADED:
            self.elsewhere.append(address)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="it is installed with Python 3.11 and newer")
    folder = tmp_path_factory.mktemp("site")
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), NOWHERE)
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, **proxies, "NO_MKDOCS_2_WARNING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    assert "WARNING" not in done.stdout
    return folder


def test_each_page_is_there_in_its_languages(site: Path) -> None:
    for page in DOCS.glob("*.md"):
        name = page.name.removesuffix(".md").removesuffix(".zh")
        assert (site / f"{name}.html").is_file()
        assert (site / "zh" / f"{name}.html").is_file()
    for name in IN_CHINESE:
        assert DOCS / f"{name}.zh.md" in TWINS
        text = (site / "zh" / f"{name}.html").read_text()
        assert '<html lang="zh"' in text
        assert re.search(r"<h2[^>]*>[^<]*[\u4e00-\u9fff]", text)


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        parser = Loaded()
        parser.feed(page.read_text())
        assert parser.elsewhere == [], page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//|@import", sheet.read_text()), sheet


def test_what_is_loaded_from_elsewhere_is_noticed() -> None:
    parser = Loaded()
    parser.feed('<script src="https://a/b.js"></script><img src="//a/b.png"><link rel="canonical" href="https://a/">')
    parser.feed('<link rel="stylesheet" href="http://a/b.css"><script src="b.js"></script><a href="https://a/">a</a>')
    assert parser.elsewhere == ["https://a/b.js", "//a/b.png", "http://a/b.css"]


def test_functions_are_shown_with_their_docstrings(site: Path) -> None:
    text = (site / "reference.html").read_text()
    for name in shardwise.__all__:
        assert re.search(rf'id="shardwise\.[\w.]*\b{name}"', text), name
    assert "Train a workload on local workers, on those of an engine, or as one of those that" in text


def test_pictures_are_what_the_program_draws(tmp_path: Path) -> None:
    command = [sys.executable, str(DOCS / "draw_pictures.py"), str(tmp_path)]
    subprocess.run(command, check=True, timeout=300)
    drawn = {path.name: path.read_text() for path in tmp_path.glob("*.svg")}
    assert drawn == {path.name: path.read_text() for path in DRAWN.glob("*.svg")}, "run make pictures"


@pytest.mark.parametrize("path", sorted(DRAWN.glob("*.svg")), ids=lambda path: path.name)
def test_pictures_can_be_read_by_all(path: Path) -> None:
    """They are well-formed, have a text for screen readers, and colours for light and dark."""
    root = ET.fromstring(path.read_text())
    title = root.find("{http://www.w3.org/2000/svg}title")
    assert title is not None
    assert title.text
    assert "prefers-color-scheme:dark" in path.read_text()
    chinese = any("\u4e00" <= letter <= "\u9fff" for letter in title.text)
    assert chinese == path.name.endswith(".zh.svg")
