"""Many runs, one after another: those that are experiments already are skipped, so that a stopped sweep goes on."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from calora.errors import CaloraError
from pipeline.repository import commit_of, experiments, refuse, uncommitted
from pipeline.settings import KEYS, Settings, checked
from pipeline.values import value_of

LISTS = ("tasks", "recipes", "compare")  # each value of a sweep over these is a list of one


def cells(assignments: Sequence[str]) -> list[dict[str, Any]]:
    """`key=a,b` and so on -> every combination, as key of params.yaml -> value; a field of the form stands for its key.

    Raises:
        CaloraError: an assignment has no `=` or no value.
    """
    axes: dict[str, list[Any]] = {}
    for text in assignments:
        key, _, values = text.partition("=")
        found = [value_of(value, "sweep") for value in values.split(",") if value]
        if not key or not found:
            raise CaloraError("sweep", "KEY=VALUE,VALUE", repr(text), "such as alpha=0.01,0.05")
        key = KEYS.get(key, key)
        axes[key] = [[value] for value in found] if key in LISTS else found
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def settings_of(cell: Mapping[str, Any]) -> Settings:
    """The form's fields for some keys of params.yaml.

    Raises:
        CaloraError: a value is out of its bounds.
    """
    fields = {key: name for name, key in KEYS.items()}
    values = {fields[key]: value for key, value in cell.items() if key in fields}
    other = {key: value for key, value in cell.items() if key not in fields}
    return checked({**values, "other": other}, "mend the sweep", KEYS)


def label_of(cell: Mapping[str, Any]) -> str:
    """What a cell changes, for a person: alpha0.01-recipesq8."""
    return "-".join(
        f"{key.rsplit('.', 1)[-1]}{value[0] if isinstance(value, list) else value}" for key, value in cell.items()
    )


def name_of(label: str, cell: Mapping[str, Any], commit: str) -> str:
    """The label, and a few letters that no other cell has, nor the same cell of another commit."""
    digest = hashlib.sha256(json.dumps([commit, dict(cell)], sort_keys=True).encode()).hexdigest()[:4]
    return re.sub("[^A-Za-z0-9._-]", "_", label)[:70].rstrip("._-") + f"-{digest}"


def sweep(
    root: Path, title: str, wanted: Sequence[Mapping[str, Any]], label: Callable[[Mapping[str, Any]], str] = label_of
) -> list[str]:
    """Run every cell that is no experiment of this commit yet; returns the names of all.

    All cells are of the commit that is checked out at the start, whatever is committed meanwhile.

    Args:
        label: of a cell, for a person; the names of the experiments begin with the title and it.

    Raises:
        CaloraError: there are uncommitted changes, or some runs failed, after the others were run.
    """
    from pipeline.flow import ca_lora

    refuse(uncommitted(root), "commit them, then start the sweep again")
    commit = commit_of(root, "HEAD")
    plan = {name_of(f"{title}-{label(cell)}", cell, commit): settings_of(cell) for cell in wanted}
    done = set(experiments(root, commit))
    failed = []
    bar = tqdm(total=len(plan), initial=len(done & plan.keys()), desc=title, unit="run", file=sys.stderr)
    for name, settings in plan.items():
        if name in done:
            continue
        if not ca_lora(name, settings, commit, return_state=True).is_completed():
            failed.append(name)
        bar.update()
    bar.close()
    if failed:
        raise CaloraError(
            title, "every run to end well", ", ".join(failed), "read the log above; start it again for these alone"
        )
    return list(plan)
