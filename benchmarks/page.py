"""The page of `calora serve` as a person uses it: what each column says of a text, and pictures.

`python -m benchmarks.page URL [folder for pictures]` with the address that a running `calora serve` printed, its key included, and
what `benchmarks.chromium` needs. Pictures: light, dark, 360 pixels wide, while an answer is streamed, without the key.
"""

from __future__ import annotations

import base64
import sys
from collections.abc import Callable
from pathlib import Path

from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait

from benchmarks.chromium import chromium

REVIEW = "The two leads are a joy to watch, but the plot goes nowhere and the jokes were old thirty years ago."
MESSAGE = "Why is the sky blue? Answer in two sentences."
WAIT = 120  # seconds


class Page:
    """The page in Chromium, and where its pictures go."""

    def __init__(self, address: str, pictures: Path) -> None:
        self.address, self.pictures = address, pictures
        self.driver = chromium(1200, 800)

    def open(self, width: int, height: int, scheme: str, address: str | None = None) -> None:
        """The page anew, as wide as asked for, light or dark."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", features)
        self.driver.get("about:blank")
        self.driver.get(address or self.address)
        self.until(lambda: self.find("form:not([hidden])").is_displayed())

    def find(self, css: str) -> WebElement:
        """The first element of a selector."""
        return self.driver.find_element(By.CSS_SELECTOR, css)

    def until(self, true: Callable[[], bool]) -> None:
        """Wait until something is so."""
        WebDriverWait(self.driver, WAIT, 0.05).until(lambda _: true())

    def ask(self, text: str) -> None:
        """Type a text in place of what stands there, and run."""
        field = self.find("textarea")
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(text)
        field.send_keys(Keys.CONTROL, Keys.ENTER)

    def done(self) -> None:
        """Wait for the end of a run."""
        self.until(lambda: self.find("#status").text.startswith("done"))

    def columns(self) -> list[str]:
        """What the columns say, a line each."""
        return [" | ".join(one.text.splitlines()) for one in self.driver.find_elements(By.CSS_SELECTOR, ".column")]

    def keep(self, name: str) -> None:
        """A picture of the whole page."""
        width, height = self.driver.execute_script("return [innerWidth, document.body.offsetHeight]")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        said = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True})
        (self.pictures / f"{name}.png").write_bytes(base64.b64decode(said["data"]))


def main() -> None:
    """Prints the columns; an error where something does not come."""
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    pictures = Path(sys.argv[2] if len(sys.argv) > 2 else ".cache/page")
    pictures.mkdir(parents=True, exist_ok=True)
    page = Page(sys.argv[1], pictures)
    for name, width, scheme in (("page", 1100, "light"), ("dark", 1100, "dark"), ("narrow", 360, "light")):
        page.open(width, 800, scheme)
        page.ask(REVIEW)
        page.done()
        page.keep(name)
        print(*page.columns(), "", sep="\n")
    page.open(1100, 800, "dark")
    Select(page.find("#choice")).select_by_visible_text("no task: answer a message")
    page.ask(MESSAGE)
    page.until(lambda: bool(page.driver.find_elements(By.CSS_SELECTOR, "[data-state=done] + [data-state=busy] .said")))
    page.keep("streaming")
    page.done()
    print(*page.columns(), sep="\n")
    page.driver.execute_script("sessionStorage.clear()")
    page.open(1100, 800, "light", page.address.partition("#")[0])
    page.keep("key")
    page.driver.quit()


if __name__ == "__main__":
    main()
