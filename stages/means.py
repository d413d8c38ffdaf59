"""Several tasks taken together: each counts as much as any other, however many test items it has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from calora.evaluation.statistics import Estimate, mean_over_tasks
from stages.scored import metric_of, value_of

ALIKE = ("bytes_on_disk", "adapter_bytes", "trainable_parameters")


def over_tasks(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """metrics.json of the mean over tasks, of one recipe: the methods that every task has, with intervals.

    Tasks have their own test items and trainings, so their errors are independent.
    """
    first = found[0]
    methods = [key for key in first["methods"] if all(key in one["methods"] for one in found)]
    means = {key: mean_of([one["methods"][key] for one in found]) for key in methods}
    counting = {metric_of(one) for one in found}  # tasks may count by different metrics: their mean is a score
    together: dict[str, Any] = {
        "metric": counting.pop() if len(counting) == 1 else "score", "methods": means, "ours": first["ours"], "baseline": first["baseline"],
        "test_items": sum(one["test_items"] for one in found), "tasks": len(found),
    }  # fmt: skip
    own = means.get(first["ours"], {})
    return together | ({"difference": own["difference"]} if "difference" in own else {})


def mean_of(methods: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One method over tasks; bytes are the mean too, though they rarely differ."""
    mean: dict[str, Any] = {"score": average(list(map(value_of, methods)))}
    mean["accuracy"] = average([m["accuracy"] for m in methods])
    mean |= {key: round(average([m[key] for m in methods])) for key in ALIKE}
    mean["ci"] = list(mean_over_tasks([Estimate(value_of(m), tuple(m["ci"])) for m in methods]).ci)
    if "downloaded_bytes" in methods[0]:
        mean["downloaded_bytes"] = methods[0]["downloaded_bytes"]
    if all("packed" in m for m in methods):
        mean["packed"] = average([m["packed"] for m in methods])
    gains = [Estimate(m["difference"]["value"], tuple(m["difference"]["ci"])) for m in methods if "difference" in m]
    if len(gains) == len(methods):
        mean["difference"] = mean_over_tasks(gains).to_json()
    return mean


def average(values: Sequence[float]) -> float:
    """Of plain numbers."""
    return sum(values) / len(values)
