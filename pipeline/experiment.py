"""An experiment as it is read back: from the working tree, from a commit, or from DVC's cache."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from calora.errors import CaloraError
from pipeline.repository import commit_of, experiments, prefix

WORKSPACE = "workspace"


@dataclass(frozen=True)
class Found:
    """What one task and recipe gave: metrics.json, the validation curves, layer -> [error before, after], and method -> the score of each test item."""

    metrics: dict[str, Any]
    curves: dict[str, Any]
    errors: dict[str, list[float]] = field(default_factory=dict)
    items: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Experiment:
    """A run: task -> recipe -> what it found, the parameters that tell it from the others, and the commit that it began at."""

    found: Mapping[str, Mapping[str, Found]]
    params: Mapping[str, Any] = field(default_factory=dict)
    commit: str = ""


def files_of(root: Path, name: str) -> Callable[[str], str]:
    """Reads files of the working tree, or of a commit or an experiment, from DVC's cache (or a remote), by their path."""
    from dvc.api import DVCFileSystem

    if name == WORKSPACE:
        return lambda path: (root / path).read_text(encoding="utf-8")
    below = prefix(root)
    files = DVCFileSystem(str(root), rev=name, subrepos=bool(below))
    return lambda path: str(files.read_text(below + path, encoding="utf-8"))


def read_experiment(root: Path, name: str) -> Experiment:
    """The results and the parameters of an experiment.

    Raises:
        CaloraError: it has no results.
    """
    try:
        text = files_of(root, name)
        params = yaml.safe_load(text("params.yaml"))
        found = {
            task: {recipe: _found(text, f"{task}/{recipe}") for recipe in params["recipes"]} for task in params["tasks"]
        }
    except Exception as error:  # dvc raises many kinds for "no such commit", "not in the cache", "no such file"
        told = str(error).strip().splitlines() or [type(error).__name__]
        fix = "choose one of `dvc exp list`, or run it again"
        raise CaloraError(f"experiment {name}", "its results", told[0], fix) from None
    return Experiment(found, flat(params), begun_at(root, name))


def begun_at(root: Path, name: str) -> str:
    """The commit whose code a run was of: that of an experiment is part of its reference."""
    if name == WORKSPACE:
        return name
    place = experiments(root).get(name)
    return "".join(place.split("/")[2:4]) if place else commit_of(root, name)


def _found(text: Callable[[str], str], place: str) -> Found:
    parts = ("metrics", "curves", "predictions")
    metrics, curves, answers = (json.loads(text(f"models/evaluated/{place}/{part}.json")) for part in parts)
    if any("adapter_bytes" not in method for method in metrics["methods"].values()):
        raise ValueError("results of an earlier version")
    method = yaml.safe_load(text("params.yaml"))["evaluate"]["ours"]
    errors = json.loads(text(f"models/inherited/{place}/{method}/inherit.json")).get("errors", {})
    return Found(metrics, curves, errors, {method: items_of(said) for method, said in answers.items()})


def items_of(said: Mapping[str, Any]) -> list[float]:
    """The scores of a method's test items, whose mean is the metric that counts; results of before have hits alone."""
    return list(said["items"] if "items" in said else said["correct"])


def flat(params: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Nested sections -> one level of keys with dots."""
    leaves: dict[str, Any] = {}
    for key, value in params.items():
        leaves |= flat(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value}
    return leaves


def differing(experiments: dict[str, Experiment]) -> dict[str, Experiment]:
    """The experiments with only those parameters that are not the same in all."""
    keys = {key for one in experiments.values() for key in one.params}
    differ = [key for key in sorted(keys) if len({repr(one.params.get(key)) for one in experiments.values()}) > 1]
    return {
        name: replace(one, params={key: one.params.get(key, "") for key in differ}) for name, one in experiments.items()
    }
