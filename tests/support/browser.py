"""A headless Chromium for tests of pages, and what it complained about or asked for."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def chromium(profile: Path, *, width: int = 1000, dark: bool = False) -> Iterator:
    """A selenium driver. Skips where no browser is installed; in CI that is a failure."""
    programs = [shutil.which("chromium") or shutil.which("google-chrome")]
    programs += [shutil.which("chromedriver")]
    selenium = None if None in programs else _selenium()
    if selenium is None:
        reason = "needs selenium, chromium and chromedriver (apt install chromium chromium-driver)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    options = selenium.ChromeOptions()
    options.binary_location = programs[0]
    for argument in (
        "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
        "disable-background-networking", "disable-component-update", "disable-sync",
        "hide-scrollbars", f"user-data-dir={profile}",
    ):  # fmt: skip
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = selenium.ChromeService(executable_path=programs[1])
    driver = selenium.Chrome(options=options, service=service)
    try:
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        driver.implicitly_wait(10)  # s, for what a click brings
        driver.get("about:blank")
        driver.get_log("performance")  # the browser's own start page
        yield driver
    finally:
        driver.quit()


def complaints(driver) -> list[str]:
    """What the console says: errors and warnings."""
    return [entry["message"] for entry in driver.get_log("browser")]


def requests(driver) -> list[str]:
    """Every URL that was asked for, but data: URIs."""
    found = []
    for entry in driver.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            found.append(message["params"]["request"]["url"])
    return [url for url in found if not url.startswith("data:")]


def too_wide(driver) -> bool:
    """Whether the page scrolls sideways."""
    return driver.execute_script(
        "return document.documentElement.scrollWidth > document.documentElement.clientWidth"
    )


def _selenium():
    try:
        from selenium import webdriver
    except ImportError:
        return None
    return webdriver
