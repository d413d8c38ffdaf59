"""The pipeline in this folder: `dvc repro`, how long each stage took, then the table of methods; and the same on a few hundred texts."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markdown import Markdown

from calora.errors import CaloraError
from pipeline.graph import WAITS, StageFailed, TryAgain, in_turn, run_stage, standing
from pipeline.process import CHECK_PARAMS, DVC, Processes, environment, workers
from pipeline.settings import ROOT
from pipeline.times import Clock, Times
from stages.resolve import merged

SMOKE: dict[str, Any] = {
    "data": {"sizes": {"train": 96, "unlabelled": 48, "validation": 32, "test": 64}},
    "teacher": {"written": {"texts": 48}},
    "train": {"steps": 6, "batch_size": 8, "warmup": 2, "eval_every": 6},
    "methods": {"calora": {"start": {"calibration_texts": 32}}},
    "compress": {"calibration": {"texts": 32, "tuning": 32}},
    "recipes": ["q8_up"],
}
NO_GIT = """This folder is no git repository: the pipeline runs, but `dvc exp` (comparing runs) needs one. To have it:
  git init && git add -A && git commit -m "start"
"""


def dvc(folder: Path, *arguments: str) -> int:
    """Run DVC in `folder`."""
    return subprocess.run([*DVC, *arguments], cwd=folder, env=environment()).returncode


def without_git(folder: Path) -> bool:
    """True if DVC has to do without git here; it is then told so, in a local setting."""
    for parent in (folder, *folder.parents):
        if (parent / ".git").exists():
            return False
    dvc(folder, "config", "--local", "--quiet", "core.no_scm", "true")
    return True


def repro(folder: Path) -> int:
    """The stages that have something to do, how long each took, and then the table of methods; the exit code is DVC's."""
    if without_git(folder):
        print(NO_GIT)
    with subprocess.Popen(CHECK_PARAMS, cwd=folder) as check:
        import dvc.repo  # noqa: F401  # it takes a second, and so does the check
    if check.returncode:
        return check.returncode
    times = Times()
    code = one_by_one(folder, times) if workers() == 1 else side_by_side(folder, times)
    times.show()
    if code:
        return code
    Console().print(Markdown((folder / "results/table.md").read_text(encoding="utf-8")))
    print(f"Details: {folder / 'results'}")
    return 0


def one_by_one(folder: Path, times: Times) -> int:
    """`dvc repro`, in this process."""
    from dvc.cli import main

    before, log, clock = dict(os.environ), logging.getLogger("dvc"), Clock(times)
    os.environ.update(environment())
    log.addHandler(clock)
    try:
        with contextlib.chdir(folder):
            return int(main(["repro"]))
    finally:
        clock.stop()
        log.removeHandler(clock)
        os.environ.clear()
        os.environ.update(before)


def side_by_side(folder: Path, times: Times) -> int:
    """The same, with as many stages at a time as CALORA_WORKERS says; after one that fails no other begins."""
    processes, (graph, known) = Processes(), standing(folder)
    if len(known) == len(graph):
        print("Data and pipelines are up to date.")
        return 0
    failed: list[StageFailed] = []

    def work(stage: str) -> None:
        if stage in known or failed:
            return
        try:
            with times.of(stage) as found:
                done = patiently(stage, folder, processes, lambda line: print(f"{stage} | {line}", flush=True))
                found["what"] = {"restored": "cached"}.get(done, done)
        except StageFailed as error:
            failed.append(error)

    with ThreadPoolExecutor(workers()) as pool:
        try:
            begun = in_turn(graph, lambda stage, _: pool.submit(work, stage), Future.done)
        except BaseException:  # Ctrl-C
            processes.stop()
            raise
    for future in begun.values():
        future.result()
    return failed[0].code if failed else 0


def patiently(stage: str, folder: Path, processes: Processes, say: Callable[[str], None]) -> str:
    """`run_stage`, again where that can help."""
    for seconds in WAITS:
        try:
            return run_stage(stage, folder, processes, say)
        except TryAgain as error:
            say(f"{error}; again in {seconds} s")
            time.sleep(seconds)
    return run_stage(stage, folder, processes, say)


def copied(folder: Path, params: Mapping[str, Any]) -> None:
    """This project in `folder`, which is a DVC project of its own, with other parameters, beside the same downloads and own files.

    Raises:
        CaloraError: DVC could not be set up there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("calora", "stages", "pipeline"):
        shutil.rmtree(folder / name, ignore_errors=True)
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "dvc.yaml", folder)
    if not (folder / "own").exists():
        (folder / "own").symlink_to(ROOT / "own")
    (folder / "params.yaml").write_text(yaml.safe_dump(dict(params), sort_keys=False), encoding="utf-8")
    os.environ.setdefault("CALORA_DOWNLOADS", str(ROOT / ".cache/downloads"))
    if not (folder / ".dvc").exists() and (code := dvc(folder, "init", "--quiet", "--no-scm")):
        raise CaloraError(folder, "`dvc init` to end well", f"exit code {code}", "see what it said above")


def smoke() -> int:
    """The pipeline with small parameters in .smoke."""
    folder = ROOT / ".smoke"
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    copied(folder, merged(params, SMOKE))
    return repro(folder)
