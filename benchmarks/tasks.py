"""Seven of the paper's tasks from their official files: CA-LoRA against a fresh LoRA of equal budget, on the embedded base.

`CALORA_WORKERS=2 python -m benchmarks.tasks DATA`, where DATA holds a folder for each task (rte, boolq, sst2, copa, mnli, qqp, squad;
each with files that are called train and val or dev). Task after task goes through the pipeline in .cache/tasks, a project of its own whose
params.yaml is this one's but for what `changes` says, and is merged into docs/tasks.json, which holds of each method what every
test item gave; so tasks and seeds can be run on different days. A run that is stopped goes on where it was.
Without DATA the table of docs/results.md is written anew. `--tiny` tries every task with a few texts and steps, and writes nothing into docs/.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.recipes import PAGE, between, hits, of_task
from calora.common.files import read_json, write_json, write_text
from calora.errors import CaloraError
from calora.evaluation.statistics import Estimate, difference_over_seeds, mean_over_tasks
from pipeline.adopt.files import by_name, files_in
from pipeline.local import copied, dvc, repro
from pipeline.settings import ROOT
from stages.common import evaluated
from stages.config import load_params
from stages.looks import METRICS, key_of
from stages.tables import Table, interval, short

HOME, DATA, NAME = ROOT / ".cache/tasks", Path("docs/tasks.json"), "tasks"
TASKS: dict[str, dict[str, int]] = {  # longest prompt, and test items where those of DATA are more than a run needs
    "rte": {"max_tokens": 192, "test": 1000},
    "boolq": {"max_tokens": 192, "test": 500},
    "sst2": {"max_tokens": 96, "test": 1000},
    "copa": {"max_tokens": 64, "test": 1000},
    "mnli": {"max_tokens": 128, "test": 1000},
    "qqp": {"max_tokens": 96, "test": 1000},
    "squad": {"max_tokens": 256, "test": 500},
}
SIZES = {"train": 1600, "unlabelled": 600, "validation": 150}
OURS, BASELINE, TEACHER = "calora", "clm_lora", "llm_lora"
COMPARE = ["clm_inherited", "calora_free", BASELINE, OURS]
COLUMNS = ["llm", TEACHER, "small_lora", *map(key_of, COMPARE)]
AGAINST = {"CA-LoRA - equal budget": key_of(BASELINE), "CA-LoRA - teacher": TEACHER}
TINY: dict[str, Any] = {
    "data": {"sizes": {"train": 24, "unlabelled": 8, "validation": 8, "test": 12}},
    "train": {"steps": 4, "batch_size": 4, "warmup": 1, "eval_every": 4},
    "methods": {"calora": {"start": {"calibration_texts": 8}}},
    "compress": {"calibration": {"texts": 32, "tuning": 32}},
}


def changes(task: str, files: Mapping[str, str], seed: int, recipe: str) -> dict[str, Any]:
    """What params.yaml of a run says otherwise: the task from its files, what is compared, the sizes.

    Args:
        files: train and test, inside own/<task>.
    """
    own = TASKS[task]
    entry = {"like": task, "folder": f"own/{task}", **files, "max_tokens": own["max_tokens"]}
    return {
        "seed": seed, "tasks": [task], "recipes": [recipe], "compare": COMPARE, "export": {"recipes": []},
        "data": {"sizes": {**SIZES, "test": own["test"]}, "sets": {task: entry}},
        "evaluate": {"ours": OURS, "baseline": BASELINE, "packed": []},
    }  # fmt: skip


def official(folder: Path) -> dict[str, Path]:
    """The training file and, as the test set, the validation file of a folder: labels of official test sets are secret.

    Raises:
        CaloraError: there is none, or no telling which.
    """
    found = by_name(files_in(folder), folder)
    if missing := [split for split in ("train", "validation") if split not in found]:
        names = ", ".join(path.name for path in found.values())
        raise CaloraError(folder, f"a file called {missing[0]} (or dev)", names, "put the official files there")
    return {"train": found["train"], "test": found["validation"]}


def run(task: str, data: Path, seed: int, recipe: str, tiny: bool) -> int:
    """One task through the pipeline; the exit code is DVC's."""
    from stages.resolve import merged

    files = official(data / task)
    home = HOME.with_name("tasks-tiny") if tiny else HOME
    for path in files.values():
        target = home / "own" / task / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    wanted = changes(task, {split: path.name for split, path in files.items()}, seed, recipe)
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    copied(home, merged(merged(params, wanted), TINY if tiny else {}))
    # What is compressed here is not compressed again.
    return dvc(home, "cache", "dir", "--local", str(ROOT / ".dvc/cache")) or repro(home)


def merge(data: dict[str, Any], task: str, recipe: str, seed: int, home: Path = HOME) -> None:
    """Add the run of a task in `home`."""
    place = home / evaluated(task, recipe)
    metrics, said = (read_json(place / f"{part}.json", "run the task") for part in ("metrics", "predictions"))
    of = data.setdefault(str(seed), {}).setdefault(task, {"metric": metrics["metric"], "recipes": {}})
    of["recipes"][recipe] = {method: stored(one["items"]) for method, one in said.items()}


def stored(items: Sequence[float]) -> dict[str, Any]:
    """What each test item gave, in bits where it is right or wrong."""
    if set(items) <= {0.0, 1.0}:
        bits = np.packbits(np.array(items, dtype=bool))
        return {"items": len(items), "hits": base64.b64encode(bits.tobytes()).decode()}
    return {"items": len(items), "scores": [round(item, 4) for item in items]}


def items_of(one: Mapping[str, Any]) -> Any:
    """The inverse of `stored`."""
    return hits(one) if "hits" in one else np.array(one["scores"])


def rows(data: Mapping[str, Any], task: str, recipe: str, method: str) -> dict[str, Any]:
    """seed -> what each test item gave."""
    found = {seed: tasks[task]["recipes"].get(recipe, {}) for seed, tasks in sorted(data.items()) if task in tasks}
    return {seed: items_of(methods[method]) for seed, methods in found.items() if method in methods}


def estimates(data: Mapping[str, Any], task: str, recipe: str) -> dict[str, Estimate]:
    """Of a task: the mean of each method over items and seeds, and what CA-LoRA has more than the two that it is measured against."""
    found = {method: of for method in COLUMNS if (of := rows(data, task, recipe, method))}
    made: dict[str, Estimate] = {method: of_task(list(of.values())) for method, of in found.items()}
    ours = found.get(key_of(OURS), {})
    for name, theirs in AGAINST.items():
        seeds = sorted(ours.keys() & found.get(theirs, {}).keys())
        if seeds:
            made[name] = difference_over_seeds([ours[s] for s in seeds], [found[theirs][s] for s in seeds])
    return made


def table(data: Mapping[str, Any], recipe: str) -> Table:
    """A line for each task, and their mean: the methods, and CA-LoRA against a fresh LoRA and the teacher, paired."""
    heads = ["task", "metric", "items", *map(short, COLUMNS), *AGAINST, "seeds"]
    made = Table(NAME, heads, {0, 1, *range(len(COLUMNS) + 3, len(heads))})
    found = {task: of for task in TASKS if key_of(OURS) in (of := estimates(data, task, recipe))}
    for task, of in found.items():
        metric = next(tasks[task]["metric"] for tasks in data.values() if task in tasks)
        ours = rows(data, task, recipe, key_of(OURS))
        items = str(len(next(iter(ours.values()))))
        made.rows.append([task, METRICS[metric], items, *cells(of), ", ".join(sorted(ours))])
    if found:
        names = [name for name in (*COLUMNS, *AGAINST) if all(name in of for of in found.values())]
        means = {name: mean_over_tasks([of[name] for of in found.values()]) for name in names}
        items = str(sum(int(row[2]) for row in made.rows))
        made.rows.append([f"mean of {len(found)}", "", items, *cells(means), ""])
    return made


def cells(of: Mapping[str, Estimate]) -> list[str]:
    """Means, then differences with their intervals; nothing for what was not run."""
    means = [f"{of[method].value:.3f}" if method in of else "" for method in COLUMNS]
    return means + [f"{of[name].value:+.3f} {interval(of[name].ci, '+')}" if name in of else "" for name in AGAINST]


def main(arguments: Sequence[str]) -> int:
    """Run what is asked for, then write data and table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tasks", description=__doc__)
    parser.add_argument(
        "data", nargs="?", type=Path, help="a folder that has one for each task; without it the table alone"
    )
    parser.add_argument(
        "--only", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK", help="some of the tasks"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recipe", default="q3", help="of params.yaml (q3)")
    parser.add_argument("--tiny", action="store_true", help="a few texts and steps, and nothing into docs/")
    chosen = parser.parse_args(arguments)
    os.chdir(ROOT)
    load_params()  # a mistake in it is told first
    data = json.loads(DATA.read_text(encoding="utf-8")) if DATA.exists() and not chosen.tiny else {}
    for task in chosen.only if chosen.data else []:
        if code := run(task, chosen.data.expanduser().absolute(), chosen.seed, chosen.recipe, chosen.tiny):
            return code
        merge(data, task, chosen.recipe, chosen.seed, HOME.with_name("tasks-tiny") if chosen.tiny else HOME)
        print(table(data, chosen.recipe).grid(), flush=True)
        if not chosen.tiny:
            write_json(DATA, data)
    if not chosen.tiny:
        text = PAGE.read_text(encoding="utf-8")
        write_text(PAGE, between(text, NAME, table(data, chosen.recipe).grid(), "benchmarks.tasks"))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except CaloraError as error:
        sys.exit(f"error: {error}")
