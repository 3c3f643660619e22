"""Reports in a real browser: no error, every panel has content, the what-if panel agrees with the command line."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import warm
from chromium import DESKTOP, PHONE, browser, picture, show
from PIL import Image, ImageChops, ImageStat
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver

from benchmarks.made_run import MadeRun, comparison, what_if, write
from shardwise.commands.report import runs_document, write_report
from shardwise.reports.page.page import render

HERE = Path(__file__).parent
IMAGES = HERE.parents[1] / "docs" / "images"
WRITE = "SHARDWISE_WRITE_PICTURES"
"""Environment variable with which the pictures on disk are written anew instead of compared."""

OPENS_SECONDS = 2.0
MOST_DIFFERENCE = 3.0
"""Mean difference of two pictures, of 255, that fonts and their smoothing explain."""


@pytest.fixture(scope="module")
def desktop() -> Iterator[WebDriver]:
    with browser(DESKTOP) as opened:
        yield opened


@pytest.fixture(scope="module")
def phone() -> Iterator[WebDriver]:
    with browser(PHONE) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages of runs of every kind, by name."""
    folder = tmp_path_factory.mktemp("pages")
    folders = {
        "comparison": [comparison(folder / "comparison")],
        "big": [MadeRun(strategy="dp=16,pp=4,microbatches=4", events=5000, slow=7).write(folder / "big")],
        "many": [MadeRun(strategy="dp=1000", steps=6, events=3000, nan_from=3, ended=False).write(folder / "many")],
        "evil": [MadeRun(workload="<script>alert(1)</script>").write(folder / "evil")],
        "two": [MadeRun().write(folder / "a"), MadeRun(strategy="tp=2").write(folder / "b")],
        "single": [MadeRun(strategy="single").write(folder / "single")],
    }
    write(folder / "big" / "what_if.json", what_if())
    for name, each in folders.items():
        write_report(folder / f"{name}.html", runs_document(each))
    found = {name: folder / f"{name}.html" for name in folders}
    found["prediction"] = folder / "prediction.html"
    found["prediction"].write_text(render(json.loads((HERE / "prediction.json").read_text())))
    return found


PAGES = ("comparison", "big", "many", "evil", "two", "single", "prediction")


@pytest.mark.parametrize("name", PAGES)
def test_every_panel_has_content_without_errors(desktop: WebDriver, pages: dict[str, Path], name: str) -> None:
    show(desktop, pages[name])
    panels = desktop.find_elements(By.CSS_SELECTOR, "section.panel")
    assert len(panels) > 7
    for panel in panels:
        assert len(panel.text) > 30, panel.get_attribute("id")
    drawn = desktop.execute_script(
        "return [...document.querySelectorAll('.chart')].filter(c => c.clientWidth).map(c => c.querySelectorAll("
        "'svg path, svg rect, canvas').length)"
    )
    assert drawn
    assert min(drawn) > 0


@pytest.mark.parametrize("name", PAGES)
def test_phones_scroll_in_one_direction(phone: WebDriver, pages: dict[str, Path], name: str) -> None:
    show(phone, pages[name])
    assert phone.execute_script("return document.documentElement.scrollWidth") == PHONE


def test_names_of_users_run_no_code(desktop: WebDriver, pages: dict[str, Path]) -> None:
    show(desktop, pages["evil"])  # an alert would end the next command with an error
    assert "<script>alert(1)</script>" in desktop.find_element(By.TAG_NAME, "h1").text


def test_a_view_can_be_chosen(desktop: WebDriver, pages: dict[str, Path]) -> None:
    show(desktop, pages["comparison"])
    choose = desktop.find_element(By.CSS_SELECTOR, "select.choose[data-panel=timeline]")
    views = desktop.find_elements(By.CSS_SELECTOR, "#timeline > .view")
    assert [view.is_displayed() for view in views] == [True, *[False] * (len(views) - 1)]
    choose.send_keys(Keys.ARROW_DOWN)
    assert [view.is_displayed() for view in views][:2] == [False, True]
    assert views[1].find_elements(By.CSS_SELECTOR, "svg, canvas")


def test_keys_look_closer_at_a_timeline(desktop: WebDriver, pages: dict[str, Path]) -> None:
    show(desktop, pages["comparison"])
    script = "return echarts.getInstanceByDom(arguments[0]).getOption().dataZoom[0].end"
    chart = desktop.find_element(By.CSS_SELECTOR, "#timeline .chart")
    assert desktop.execute_script(script, chart) == 100
    chart.send_keys("+")
    assert desktop.execute_script(script, chart) == 75
    chart.send_keys("0")
    assert desktop.execute_script(script, chart) == 100


def test_dark_and_print_draw_anew(desktop: WebDriver, pages: dict[str, Path]) -> None:
    show(desktop, pages["single"])
    light = picture(desktop, 600)
    desktop.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    )
    dark = picture(desktop, 600)
    desktop.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": []})
    assert not desktop.find_element(By.TAG_NAME, "nav").is_displayed()
    desktop.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})
    assert ImageStat.Stat(light.convert("L")).mean[0] > 200
    assert ImageStat.Stat(dark.convert("L")).mean[0] < 60


def set_stop(opened: WebDriver, name: str, place: int) -> None:
    opened.execute_script(
        "const e = document.querySelector(`input[data-stop=${arguments[0]}]`); e.value = arguments[1];"
        "e.dispatchEvent(new Event('input', {bubbles: true}))",
        name,
        place,
    )


def shown(opened: WebDriver, name: str) -> str:
    return opened.find_element(By.CSS_SELECTOR, f"[data-result={name}]").text


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the page that `shardwise simulate --report` writes."""
    page = tmp_path_factory.mktemp("simulated") / "page.html"
    workload = "gpt:layers=2,hidden=64,heads=2,vocabulary=256,sequence=32,batch_size=8"
    command = ["simulate", workload, "--cluster", "h100x4", "--strategy", "dp=4", "--strategy", "tp=4"]
    done = warm.run([sys.executable, "-m", "shardwise", *command, "--report", str(page)], timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith(f"report: {page}")
    return page


@pytest.mark.parametrize("places", [None, (1, 0, 2), (3, 4, 0), (0, 2, 1)])
def test_what_if_is_what_the_command_line_says(
    desktop: WebDriver, simulated: Path, places: tuple[int, int, int] | None
) -> None:
    show(desktop, simulated)
    for name, place in zip(("devices", "bandwidth", "batch"), places or (), strict=False):
        set_stop(desktop, name, place)
    words = shlex.split(shown(desktop, "command"))
    assert words[:2] == ["shardwise", "simulate"]
    done = warm.run([sys.executable, "-m", "shardwise", *words[1:]], timeout=300)
    assert done.returncode == 0, done.stderr
    (candidate,) = json.loads(done.stdout)["candidates"]
    exact = {
        name: desktop.find_element(By.CSS_SELECTOR, f"[data-result={name}]").get_attribute("data-exact") or ""
        for name in ("step", "rate")
    }
    assert float(exact["step"]) == candidate["step_seconds"]
    assert float(exact["rate"]) == candidate["samples_per_second"]
    printed = done.stderr  # with --json, the table for people
    for name in ("strategy", "step", "rate", "memory"):
        assert shown(desktop, name) in printed


def test_one_strategy_can_be_looked_at(desktop: WebDriver, pages: dict[str, Path]) -> None:
    show(desktop, pages["big"])
    assert shown(desktop, "strategy") == "dp=4"
    desktop.find_element(By.CSS_SELECTOR, "select[data-stop=strategy]").send_keys("tp=4")
    assert shown(desktop, "strategy") == "tp=4"
    set_stop(desktop, "devices", 3)
    assert shown(desktop, "strategy") == "dp=8"  # there is no tp=4 on 8 devices: the best one


def test_a_large_report_opens_quickly(desktop: WebDriver, pages: dict[str, Path]) -> None:
    assert pages["big"].stat().st_size < 5_000_000
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        desktop.get(pages["big"].as_uri())
        times.append(time.perf_counter() - begin)
    assert min(times) < OPENS_SECONDS


@pytest.mark.parametrize(
    ("width", "height", "name"), [(DESKTOP, 1560, "report.png"), (PHONE, 2000, "report-phone.png")]
)
def test_it_looks_as_on_disk(pages: dict[str, Path], width: int, height: int, name: str) -> None:
    with browser(width) as opened:
        show(opened, pages["prediction"])
        now = picture(opened, height)
    if os.environ.get(WRITE):
        IMAGES.mkdir(exist_ok=True)
        now.quantize(256, dither=Image.Dither.NONE).save(IMAGES / name, optimize=True)
    before = Image.open(IMAGES / name).convert("RGB")
    assert now.size == before.size
    assert difference(now, before) < MOST_DIFFERENCE
    assert difference(now, ImageChops.offset(before, 0, 40)) > MOST_DIFFERENCE  # the measure would notice a shift


def difference(first: Image.Image, second: Image.Image) -> float:
    """Return the mean difference of two pictures, made smaller so that the smoothing of letters does not count."""
    small = first.width // 4, first.height // 4
    found = ImageChops.difference(first.resize(small).convert("L"), second.resize(small).convert("L"))
    return float(ImageStat.Stat(found).mean[0])
