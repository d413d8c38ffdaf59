"""Chromium without a window, with its driver (Debian: `apt install chromium chromium-driver`) and `pip install selenium`."""

from __future__ import annotations

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

BROWSER, DRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu")


def chromium(width: int, height: int) -> webdriver.Chrome:
    """A browser with a page of this size, in pixels, that keeps what the console says."""
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"--window-size={width},{height}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=Service(DRIVER))
