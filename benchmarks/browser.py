"""The Prefect UI as a person uses it: fill in the form, run, look at the artifacts, have a value refused, cancel a run, schedule one.

`python -m benchmarks.browser [folder for pictures]` beside a running `make ui PORT=4300`, after `make run`, with what
`benchmarks.chromium` needs. The cancelled run trains with another alpha.
"""

from __future__ import annotations

import json
import sys
import time
import urllib.request
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from benchmarks.chromium import chromium

SERVER = "http://127.0.0.1:4300"
OVER = ("COMPLETED", "FAILED", "CANCELLED")


def api(path: str, data: dict[str, Any] | None = None) -> Any:
    """The answer of Prefect's API."""
    body = None if data is None else json.dumps(data).encode()
    request = urllib.request.Request(f"{SERVER}/api{path}", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


class Browser:
    """Chromium without a window, and where its pictures go."""

    def __init__(self, pictures: Path) -> None:
        self.driver = chromium(1400, 1500)
        self.pictures = pictures
        self.began = datetime.now(UTC).isoformat()
        self.deployment = api("/deployments/name/ca-lora/local")["id"]

    def see(self, path: str, picture: str) -> None:
        """Open a page, wait until it has drawn itself, and keep a picture."""
        self.driver.get(f"{SERVER}/{path}")
        time.sleep(7)
        self.keep(picture)

    def keep(self, picture: str) -> None:
        """A picture of the page as it is."""
        self.driver.save_screenshot(str(self.pictures / f"{picture}.png"))

    def fill(self, label: str, text: str) -> None:
        """Type into the field below a label."""
        labels = self.driver.find_elements(By.TAG_NAME, "label")
        found = next(each for each in labels if each.text.lower().startswith(label))
        field = found.find_element(By.XPATH, "(./following::*[self::input or self::textarea])[1]")
        field.click()
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(text)

    def press(self, text: str) -> None:
        """The last button with this text."""
        buttons = self.driver.find_elements(By.TAG_NAME, "button")
        button = [each for each in buttons if each.text.strip() == text][-1]
        self.driver.execute_script("arguments[0].scrollIntoView()", button)
        time.sleep(0.5)
        button.click()
        time.sleep(2)

    def submit(self, name: str, alpha: str) -> None:
        """The form, with two fields filled in."""
        self.see(f"deployments/deployment/{self.deployment}/run", f"{name}-empty")
        self.fill("name (", name)
        self.fill("alpha", alpha)
        self.keep(f"{name}-form")
        self.press("Submit")
        self.keep(f"{name}-submitted")

    def schedule(self, cron: str) -> None:
        """A cron schedule, set on the deployment's page."""
        self.see(f"deployments/deployment/{self.deployment}", "deployment")
        self.press("Schedule")
        self.press("Cron")
        self.fill("value", cron)
        self.keep("schedule")
        self.press("Save")

    def unschedule(self) -> None:
        """Remove every schedule of the deployment."""
        for schedule in api(f"/deployments/{self.deployment}")["schedules"]:
            place = f"{SERVER}/api/deployments/{self.deployment}/schedules/{schedule['id']}"
            urllib.request.urlopen(urllib.request.Request(place, method="DELETE")).close()

    def run_of(self, name: str | None) -> dict[str, Any] | None:
        """The newest run of this name; None: of those that a schedule began."""
        wanted = {} if name else {"start_time": {"after_": self.began, "is_null_": False}}
        runs = api("/flow_runs/filter", {"sort": "EXPECTED_START_TIME_DESC", "limit": 50, "flow_runs": wanted})
        return next((run for run in runs if run["parameters"].get("name") == name), None)

    def wait(self, name: str | None, kinds: tuple[str, ...], seconds: float) -> dict[str, Any]:
        """The run, once its state is one of some kinds."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            run = self.run_of(name)
            if run and run["state"]["type"] in kinds:
                return run
            time.sleep(0.2)
        raise AssertionError(f"{name}: {run and run['state']}")


def main() -> None:
    """One line for what was seen; raises AssertionError where something else happened."""
    pictures = Path(sys.argv[1] if len(sys.argv) > 1 else ".cache/browser")
    pictures.mkdir(parents=True, exist_ok=True)
    browser = Browser(pictures)
    browser.submit("refused", "-1")
    assert browser.run_of("refused") is None
    assert "minimum" in browser.driver.page_source
    print("alpha -1: refused by the form")

    browser.submit("clicked", "0.055")
    run = browser.wait("clicked", OVER, 300)
    assert run["state"]["type"] == "COMPLETED", run["state"]
    print(f"a run with alpha as it was: {run['total_run_time']:.0f} s")
    browser.see(f"runs/flow-run/{run['id']}", "run")
    found = api("/artifacts/filter", {"flow_runs": {"id": {"any_": [run["id"]]}}, "limit": 50})
    for artifact in found:
        browser.see(f"artifacts/artifact/{artifact['id']}", f"artifact-{artifact['key']}")
    print("artifacts:", ", ".join(sorted(artifact["key"] for artifact in found)))

    browser.submit("cancelled", f"0.2{int(time.time()) % 1000}")
    run = browser.wait("cancelled", ("RUNNING",), 120)
    time.sleep(25)
    browser.see(f"runs/flow-run/{run['id']}", "running")
    browser.press("Cancel")
    clicked = time.monotonic()
    browser.press("Confirm")
    browser.wait("cancelled", ("CANCELLED",), 60)
    print(f"cancelled {time.monotonic() - clicked:.1f} s after the click")
    browser.see(f"runs/flow-run/{run['id']}", "cancelled")

    browser.schedule("* * * * *")
    run = browser.wait(None, OVER, 180)
    assert run["auto_scheduled"] and run["state"]["type"] == "COMPLETED", run["state"]
    print(f"a run of the schedule: due {run['expected_start_time']}, began {run['start_time']}")
    browser.see(f"deployments/deployment/{browser.deployment}", "scheduled")
    browser.unschedule()
    browser.driver.quit()


if __name__ == "__main__":
    main()
