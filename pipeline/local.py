"""The pipeline in this folder: `dvc repro`, then the table of methods; and the same on a few hundred texts."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import yaml
from rich.console import Console
from rich.markdown import Markdown

from pipeline.process import CHECK_PARAMS, DVC, environment
from pipeline.settings import ROOT

SMOKE = {
    "data": {"sizes": {"train": 96, "unlabelled": 48, "validation": 32, "test": 64}},
    "train": {"steps": 6, "batch_size": 8, "warmup": 2, "eval_every": 6},
    "inherit": {"calibration_texts": 32},
    "compress": {"calibration": {"texts": 32}},
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
    """`dvc repro`, then the table."""
    if without_git(folder):
        print(NO_GIT)
    if code := subprocess.run(CHECK_PARAMS, cwd=folder).returncode:
        return code
    if code := dvc(folder, "repro"):
        return code
    Console().print(Markdown((folder / "results/table.md").read_text(encoding="utf-8")))
    print(f"Details: {folder / 'results'}")
    return 0


def merged(base: dict[str, object], change: dict[str, object]) -> dict[str, object]:
    """`base` with the leaves of `change`."""
    result = dict(base)
    for key, value in change.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def smoke() -> int:
    """The pipeline with small parameters in .smoke, a DVC project of its own beside the same downloads."""
    folder = ROOT / ".smoke"
    folder.mkdir(exist_ok=True)
    for name in ("calora", "stages", "pipeline"):
        shutil.rmtree(folder / name, ignore_errors=True)
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "dvc.yaml", folder)
    if not (folder / "own").exists():
        (folder / "own").symlink_to(ROOT / "own")
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    (folder / "params.yaml").write_text(yaml.safe_dump(merged(params, SMOKE), sort_keys=False), encoding="utf-8")
    os.environ.setdefault("CALORA_DOWNLOADS", str(ROOT / ".cache/downloads"))
    if not (folder / ".dvc").exists() and (code := dvc(folder, "init", "--quiet", "--no-scm")):
        return code
    return repro(folder)
