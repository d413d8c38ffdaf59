"""The figures: the metric that counts, against bytes and against steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stages.looks import LOOKS, METRICS, look_of
from stages.scored import metric_of, value_of

BYTES = "MB on disk (base and adapter)"
MANY = 16  # tasks on one base, of the second panel of the front


def blank(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure, in inches; no window system is asked."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    return figure, axes


def legend_once(figure: Figure, axes: Axes) -> None:
    """A legend below the axes with one entry for each label, however many points have it."""
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    figure.legend(once.values(), once.keys(), fontsize=8, ncols=4, loc="outside lower center")


def below_and_above(*found: Mapping[str, Any]) -> list[list[float]]:
    """The lengths of error bars: from scores to the two ends of their intervals."""
    return [[value_of(m) - m["ci"][0] for m in found], [m["ci"][1] - value_of(m) for m in found]]


def tested(metrics: Mapping[str, Any]) -> str:
    """What the axis of test scores says."""
    return f"test {METRICS[metric_of(metrics)]}"


def downloaded(axes: Axes, methods: Mapping[str, Any]) -> None:
    """A line at the bytes of the file that the uncompressed model was made from, where it held it in fewer."""
    size = methods["llm"].get("downloaded_bytes", math.inf)
    if size < 0.9 * methods["llm"]["bytes_on_disk"]:
        axes.axvline(size / 1e6, color="#999999", lw=1, ls=":", label="the downloaded file")


def curve(axes: Axes, method: str, scores: list[dict[str, float]], **look: Any) -> None:
    """The validation score of one method against step."""
    own = look_of(method)
    steps, values = [s["step"] for s in scores], [s["score"] for s in scores]
    axes.plot(steps, values, marker=own.marker, label=own.label, color=own.colour, **look)


def recipes_against_bytes(found: Mapping[str, Any], task: str) -> Figure:
    """Each recipe an arrow: from the inherited LoRA to CA-LoRA, megabytes on disk against accuracy."""
    figure, axes = blank(7.5, 4.6)
    methods = next(iter(found.values()))["methods"]
    downloaded(axes, methods)
    whole, own = methods["llm_lora"], look_of("llm_lora")
    axes.axhline(value_of(whole), color=own.colour, lw=1, ls="--")
    axes.plot(whole["bytes_on_disk"] / 1e6, value_of(whole), own.marker, ms=9, color=own.colour, label=own.label)
    for recipe, metrics in found.items():
        shown = [key for key in ("clm_inherited", metrics["ours"]) if key in metrics["methods"]]
        places = [(m["bytes_on_disk"] / 1e6, value_of(m)) for m in (metrics["methods"][key] for key in shown)]
        for before, after in pairwise(places):
            arrow = {"arrowstyle": "->", "color": "#999999", "shrinkA": 5, "shrinkB": 6}
            axes.annotate("", after, before, arrowprops=arrow)
        for place, method in zip(places, shown, strict=True):
            own = look_of(method)
            axes.plot(*place, own.marker, ms=9, color=own.colour, label=own.label)
        if places:
            axes.annotate(recipe, places[-1], xytext=(8, -3), textcoords="offset points", fontsize=8)
    axes.set(xlabel=BYTES, ylabel=tested(next(iter(found.values()))), title=f"{task}: before and after CA-LoRA")
    axes.margins(y=0.12)
    legend_once(figure, axes)
    return figure


def front(found: Mapping[str, Any], task: str) -> Figure:
    """Every method of every recipe a point, with an adapter for one task and for 16, and what no other is both smaller and better than."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, tasks in zip(panels, (1, MANY), strict=True):
        points = []
        for metrics in found.values():
            for method, m in metrics["methods"].items():
                own = look_of(method)
                points.append((bytes_of(m, tasks) / 1e6, value_of(m)))
                axes.plot(*points[-1], own.marker, ms=7, color=own.colour, label=own.label)
        axes.plot(*zip(*pareto(points), strict=True), drawstyle="steps-post", color="#999999", lw=1, zorder=0)
        downloaded(axes, next(iter(found.values()))["methods"])
        axes.set(xlabel=BYTES if tasks == 1 else f"MB on disk (base and {tasks} adapters)", title=task)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(tested(next(iter(found.values()))))
    legend_once(figure, panels[0])
    return figure


def bytes_of(method: Mapping[str, Any], tasks: int) -> int:
    """A base with an adapter for each of so many tasks."""
    size: int = method["bytes_on_disk"] + (tasks - 1) * method["adapter_bytes"]
    return size


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (bytes, score), those that no other is both smaller and better than, by bytes."""
    best: list[tuple[float, float]] = []
    for size, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or accuracy > best[-1][1]:
            best.append((size, accuracy))
    return best


def layer_errors(errors: dict[str, list[float]], title: str) -> Figure:
    """Relative error of each layer before and after the start of the bypass, a panel for each kind of layer."""
    kinds: dict[str, list[list[float]]] = {}
    for layer, pair in errors.items():
        kinds.setdefault(layer.rsplit(".", 1)[-1], []).append(pair)
    figure = Figure(figsize=(max(2.0 * len(kinds), 4.0), 2.6), layout="constrained")
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for axes, (kind, pairs) in zip(panels, kinds.items(), strict=True):
        axes.plot([before for before, _ in pairs], color=LOOKS["clm"].colour, ls="--", label="before")
        axes.plot([after for _, after in pairs], color=LOOKS["clm_calora"].colour, label="after")
        axes.set_title(kind, fontsize=9)
        axes.set_xlabel("block", fontsize=8)
        axes.locator_params(axis="x", nbins=3, integer=True)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("relative error", fontsize=8)
    panels[0].legend(fontsize=7)
    figure.suptitle(title, fontsize=10)
    return figure


def accuracy_against_bytes(metrics: dict[str, Any], title: str) -> Figure:
    """Every method a point: megabytes on disk against the metric that counts, with its interval."""
    figure, axes = blank(7, 4.2)
    downloaded(axes, metrics["methods"])
    for method, m in metrics["methods"].items():
        own, place = look_of(method), (m["bytes_on_disk"] / 1e6, value_of(m))
        axes.errorbar(*place, below_and_above(m), fmt=own.marker, ms=9, capsize=3, label=own.label, color=own.colour)
    axes.set(xlabel=BYTES, ylabel=tested(metrics), title=title)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def convergence(curves: dict[str, Any], title: str, metric: str = "accuracy") -> Figure:
    """The metric that counts, on validation, against step, of every method that was trained."""
    figure, axes = blank(7, 4.2)
    for method, scores in curves.items():
        curve(axes, method, scores, ms=9)
    axes.set(xlabel="step", ylabel=f"validation {METRICS[metric]}", title=title)
    axes.legend(fontsize=8)
    return figure


def losses(parts: dict[str, list[tuple[int, float]]], title: str) -> Figure:
    """A loss and its parts against step, a panel each: part -> (step, value)."""
    figure = Figure(figsize=(2.8 * len(parts), 2.8), layout="constrained")
    panels = figure.subplots(1, len(parts), squeeze=False)[0]
    for axes, (part, points) in zip(
        panels, sorted(parts.items(), key=lambda part: (part[0] != "loss", part)), strict=True
    ):
        axes.plot(*zip(*points, strict=True), color=LOOKS["clm_calora"].colour, lw=1)
        axes.set(title=part, xlabel="step")
        axes.grid(alpha=0.3)
    figure.suptitle(title, fontsize=10)
    return figure


def curves_beside(panels: Sequence[Axes], curves: Mapping[str, Any]) -> None:
    """The validation score against step, a panel for each title."""
    for axes, (title, methods) in zip(panels, curves.items(), strict=True):
        for method, scores in methods.items():
            curve(axes, method, scores)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)


def convergences(curves: dict[str, Any], task: str, metric: str = "accuracy") -> Figure:
    """The metric that counts, on validation, against step, a panel for each recipe."""
    figure = Figure(figsize=(3.2 * len(curves), 3.4), layout="constrained")
    panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    curves_beside(panels, curves)
    panels[0].set_ylabel(f"{task}: validation {METRICS[metric]}")
    panels[0].legend(fontsize=8)
    return figure


def labels(
    scores: Mapping[str, Any], free: str, curves: Mapping[int, Any], title: str, metric: str = "accuracy"
) -> Figure:
    """The test score against the number of labels, with intervals, and the validation score against step, a panel a number.

    Args:
        scores: method -> number of labels -> score and ci.
        free: the method that takes no step: a line.
        curves: number of labels -> method -> its validation scores.
    """
    figure = Figure(figsize=(4.6 + 2.6 * len(curves), 4.2), layout="constrained")
    ratios = [1.7, *(1.0 for _ in curves)]
    first, *panels = figure.subplots(1, 1 + len(curves), squeeze=False, width_ratios=ratios)[0]
    for method, found in scores.items():
        own = look_of(method)
        if method == free:
            (only,) = found.values()
            first.axhline(value_of(only), ls="--", lw=1, color=own.colour, label=own.label)
            first.axhspan(*only["ci"], alpha=0.1, color=own.colour, lw=0)
            continue
        places, values = [list(curves).index(count) for count in found], [*map(value_of, found.values())]
        bars = below_and_above(*found.values())
        first.errorbar(places, values, bars, fmt=f"{own.marker}-", ms=7, capsize=3, color=own.colour, label=own.label)
    first.set_xticks(range(len(curves)), list(map(str, curves)))
    first.set(xlabel="labels", ylabel=f"test {METRICS[metric]}", title=title)
    first.grid(alpha=0.3)
    curves_beside(panels, {f"{count} labels": methods for count, methods in curves.items()})
    for axes in panels[1:]:
        axes.sharey(panels[0])
    panels[0].set_ylabel(f"validation {METRICS[metric]}")
    legend_once(figure, first)
    return figure


def ranking(scores: dict[str, dict[str, dict[str, Any]]], title: str, metric: str = "accuracy") -> Figure:
    """A line for each name, the first at the top: the test score of its methods, each with its interval."""
    figure, axes = blank(7.5, 1.6 + 0.26 * len(scores))
    for place, methods in enumerate(scores.values()):
        for method, m in methods.items():
            own, bar = look_of(method), below_and_above(m)
            axes.errorbar(
                value_of(m), place, xerr=bar, fmt=own.marker, ms=7, capsize=3, color=own.colour, label=own.label
            )
    axes.set_yticks(range(len(scores)), list(scores), fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel=f"test {METRICS[metric]}", title=title)
    if any(len(methods) > 1 for methods in scores.values()):
        legend_once(figure, axes)
    return figure
