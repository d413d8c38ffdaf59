"""A DVC project of the same shape as ours whose stages take no time: they square a number."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from pipeline.process import environment
from pipeline.repository import git

# `how` lets `square` fail (badly), or wait at first and go on when it is started again (slowly).
DVC_YAML = """
stages:
  number:
    cmd: python stages/number.py
    params: [number]
    outs: [number.txt]
  square:
    foreach: ${recipes}
    do:
      cmd: python stages/square.py ${item}
      deps: [number.txt, stages/square.py]
      params: [how]
      outs: ["squares/${item}.txt"]
  report:
    cmd: python stages/report.py
    deps: [squares]
    params: [recipes]
    outs:
      - results/summary.json: {cache: false}
      - results/table.md: {cache: false}
      - results/plots: {cache: false}
metrics: [results/summary.json]
"""
FILES = {
    "params.yaml": "number: 3  # a comment\nhow: well\nrecipes: [a, b]\n",
    "dvc.yaml": DVC_YAML,
    ".gitignore": ".cache/\ncheckpoints\n.prefect/\n",
    ".dvcignore": ".cache/\n",
    ".dvc/config": "",  # with the next one: what `dvc init` writes
    ".dvc/.gitignore": "/config.local\n/tmp\n/cache\n",
    "stages/common.py": "def run(act):\n    act(None)\n",
    "stages/number.py": "import yaml\nopen('number.txt', 'w').write(str(yaml.safe_load(open('params.yaml'))['number']))\n",
    "stages/square.py": """
import os, pathlib, sys, time, yaml
how, item = yaml.safe_load(open('params.yaml'))['how'], sys.argv[1]
kept = pathlib.Path('checkpoints'); kept.mkdir(exist_ok=True)
if how == 'badly' and item == 'a':
    sys.exit('error: a cannot be squared')
if how == 'slowly' and not (kept / 'half').exists():
    (kept / 'half').write_text('')
    print('half: 1 of 2 steps, 00:01 gone, 00:01 left, loss=0.5', flush=True)
    time.sleep(60)
pathlib.Path('squares').mkdir(exist_ok=True)
number = int(open('number.txt').read())
pathlib.Path(f'squares/{item}.txt').write_text(str(number * number))
""",
    "stages/report.py": """
import json, pathlib
found = {p.stem: {'square': int(p.read_text())} for p in pathlib.Path('squares').glob('*.txt')}
pathlib.Path('results/plots').mkdir(parents=True, exist_ok=True)
pathlib.Path('results/plots/one.png').write_bytes(b'png')
pathlib.Path('results/summary.json').write_text(json.dumps({'toy': found}))
pathlib.Path('results/table.md').write_text('| square |\\n')
""",
}  # fmt: skip


def make_toy(repository: Path, below: str = "") -> Path:
    """The project, committed: a repository of its own, or a folder of one."""
    folder = repository / below
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    subprocess.run(["git", "init", "--quiet", repository], check=True)
    with (repository / ".git/config").open("a") as config:
        config.write("[user]\n\tname = tester\n\temail = t@example.org\n")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "start")
    return folder


def left(folder: Path) -> list[str]:
    """What runs left behind."""
    worktrees = git(folder, "worktree", "list").strip().splitlines()[1:]
    return worktrees + [str(path) for path in (folder / ".cache/runs").glob("*")]


RUN = """
from pathlib import Path
from pipeline.server import alone
alone()
from pipeline import flow
from pipeline.settings import Settings
flow.ROOT, flow.show_results = Path({root!r}), lambda *_: None
state = flow.ca_lora(name={name!r}, settings=Settings(other={other!r}), return_state=True)
raise SystemExit(0 if state.is_completed() else 1)
"""


def start_run(root: Path, name: str, other: dict[str, Any]) -> subprocess.Popen[bytes]:
    """A run in a process of its own, as `python -m pipeline run` does it."""
    code = RUN.format(root=str(root), name=name, other=other)
    env = environment(TOY_RUN=str(root), PREFECT_HOME=str(root / ".prefect"), PREFECT_LOGGING_LEVEL="ERROR")
    env.pop("PREFECT_API_URL", None)
    return subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def processes(root: Path) -> dict[int, str]:
    """Command lines of the processes that this project's runs started, by process id."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                ours = f"TOY_RUN={root}".encode() in (entry / "environ").read_bytes()
            except OSError:
                continue
            if ours and line:
                found[int(entry.name)] = line
    return found
