"""Time to write the report of 64 ranks with 10,000 events, its size, and the time that Chromium takes to open it."""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import environment, median, record
from benchmarks.made_run import MadeRun, what_if, write
from shardwise.commands.report import runs_document, write_report

RANKS, EVENTS = 64, 10_000
MOST_WRITE_SECONDS, MOST_OPEN_SECONDS, MOST_BYTES = 3.0, 2.0, 5_000_000


def opened(page: Path, repeats: int) -> list[float]:
    """Return the seconds until the page is loaded in headless Chromium, each time in a new tab of one browser."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,1000"):
        options.add_argument(argument)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(shutil.which("chromedriver"))))
    found = []
    try:
        for _ in range(repeats):
            browser.switch_to.new_window("tab")
            begin = time.perf_counter()
            browser.get(page.as_uri())
            found.append(time.perf_counter() - begin)
    finally:
        browser.quit()
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    before = environment(threads=None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = MadeRun(strategy="dp=16,pp=4,microbatches=4", events=EVENTS // 2, steps=1000, slow=7).write(
            folder / "run"
        )
        write(run / "what_if.json", what_if())
        page = folder / "report.html"
        writing = []
        for _ in range(options.repeats):
            begin = time.perf_counter()
            write_report(page, runs_document([run]))
            writing.append(time.perf_counter() - begin)
        opening = opened(page, options.repeats)
        size = page.stat().st_size
    row: dict[str, Any] = {
        "ranks": RANKS,
        "events": EVENTS,
        "write_seconds": median(writing),
        "open_seconds": median(opening),
        "bytes": size,
        "met": "yes"
        if median(writing) < MOST_WRITE_SECONDS and median(opening) < MOST_OPEN_SECONDS and size < MOST_BYTES
        else "no",
    }
    record("report", {"repeats": options.repeats}, [row], {"write": writing, "open": opening}, before)


if __name__ == "__main__":
    main()
