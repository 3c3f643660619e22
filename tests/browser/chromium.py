"""A headless Chromium that shows pages of the disk, and pictures of them."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.remote.webdriver import WebDriver

CHROMIUM, DRIVER = "chromium", "chromedriver"
"""Programs of Debian's packages `chromium` and `chromium-driver`."""

REQUIRED = "SHARDWISE_BROWSER"
"""Environment variable that `make browser` sets: a browser that is missing is an error then."""

DESKTOP, PHONE = 1280, 390
"""Widths of the window in pixels."""

HIDDEN = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage")


@contextlib.contextmanager
def browser(width: int = DESKTOP) -> Iterator[WebDriver]:
    """Start a browser with a window of this width; the test is skipped where there is none, unless it is required."""
    program, driver = shutil.which(CHROMIUM), shutil.which(DRIVER)
    if program is None or driver is None:
        missing = f"{CHROMIUM} and {DRIVER} are not installed"
        (pytest.fail if os.environ.get(REQUIRED) else pytest.skip)(missing)
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in (*HIDDEN, f"--window-size={width},1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        metrics = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": width < 600}
        opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        yield opened
    finally:
        opened.quit()


def show(opened: WebDriver, page: Path) -> None:
    """Open a page, draw all of its charts, and check that the console has no error."""
    opened.get(page.resolve().as_uri())
    opened.execute_script("shardwise.drawAll()")
    assert errors(opened) == []


def errors(opened: WebDriver) -> list[Any]:
    return [
        entry["message"]
        for entry in opened.execute("getLog", {"type": "browser"})["value"]
        if entry["level"] in ("SEVERE", "WARNING")
    ]


def picture(opened: WebDriver, height: int) -> Image.Image:
    """Return the first `height` pixels of the page."""
    width = opened.execute_script("return document.documentElement.clientWidth")
    clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
    shot = opened.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    return Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")
