"""Kill runs at random moments: each time every process ends, and the same run started again ends right.

`python -m benchmarks.kills [rounds] [seed]`: a toy project in a temporary folder, with stages that take a minute when they are started first;
victims are the flow, DVC, a stage and the server of Prefect. All of them are killed with SIGKILL.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from pipeline.experiment import files_of
from pipeline.repository import commit_of, experiments, git
from tests.toyproject import left, make_toy, processes, start_run

GONE = 10  # seconds until no process may be left of a run that was killed, or ended because a stage of it was
VICTIMS = {
    "flow": "flow.ca_lora",
    "dvc": "-m dvc --wait-for-lock repro",
    "stage": "stages/",
    "server": "prefect server",
}


def round_of(root: Path, number: int, dice: random.Random) -> str:
    """One kill, and the same run again; what happened, in a line. Raises AssertionError where anything is left or wrong."""
    other = {"number": number, "how": "slowly"}
    kind, delay = dice.choice(list(VICTIMS)), dice.uniform(0.5, 14)
    process = start_run(root, f"run{number}", other)
    deadline = time.monotonic() + delay
    while time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    victims: list[int] = []
    while not victims and process.poll() is None:
        victims = [pid for pid, line in processes(root).items() if VICTIMS[kind] in line and "guard.py" not in line]
        time.sleep(0.02)
    for pid in victims[:1]:
        with contextlib.suppress(ProcessLookupError):  # it may just have ended by itself
            os.kill(pid, signal.SIGKILL)
    if kind in ("stage", "dvc"):
        process.wait(150)  # a run without one of its stages goes on with those that do not need it
    began = time.monotonic()
    process.wait(60)
    while processes(root) and time.monotonic() < began + GONE:
        time.sleep(0.1)
    took = time.monotonic() - began
    assert not processes(root) and took < GONE, (took, processes(root))
    again = start_run(root, f"run{number}", other).wait(180)
    assert again == 0, f"run{number} after {kind} at {delay:.1f} s: exit code {again}"
    name = list(experiments(root, commit_of(root, "HEAD")))[-1]
    squares = json.loads(files_of(root, name)("results/summary.json"))["toy"]
    assert all(one["square"] == number**2 for one in squares.values()), squares
    assert git(root, "status", "--porcelain") == "" and left(root) == [], left(root)
    return f"{kind} at {delay:.1f} s ({'killed' if victims else 'was over'}): all gone after {took:.1f} s, the next run is right"


def main() -> None:
    """Some rounds, a line each."""
    rounds, seed = (int(value) for value in [*sys.argv[1:], *("20", "0")[len(sys.argv) - 1 :]])
    dice = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        root = make_toy(Path(folder) / "project")
        for number in range(2, rounds + 2):
            print(round_of(root, number, dice), flush=True)


if __name__ == "__main__":
    main()
