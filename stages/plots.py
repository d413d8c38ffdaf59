"""The figures: accuracy against bytes, and against steps. Okabe and Ito's colours and a marker each, safe for colour-blind readers and in print."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

BYTES = "MB on disk (base and adapter)"
BLACK = "#010101"  # told apart from SVG's default, which nobody writes
# In the table's order: label, colour and marker.
METHODS = {
    "llm": ("LLM", "#56B4E9", "s"),
    "llm_lora": ("LLM + LoRA (teacher)", "#009E73", "s"),
    "small_lora": ("small model + LoRA", "#CC79A7", "^"),
    "clm": ("CLM", BLACK, "v"),
    "clm_inherited": ("CLM + inherited LoRA", "#D55E00", "D"),
    "clm_lora_qk": ("CLM + LoRA (q, k)", "#999999", "P"),
    "clm_lora": ("CLM + LoRA (equal budget)", "#E69F00", "o"),
    "clm_calora": ("CLM + CA-LoRA", "#0072B2", "*"),
}


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


def below_and_above(m: dict[str, Any]) -> list[list[float]]:
    """The lengths of an error bar: from an accuracy to the two ends of its interval."""
    return [[m["accuracy"] - m["ci"][0]], [m["ci"][1] - m["accuracy"]]]


def curve(axes: Axes, method: str, scores: list[dict[str, float]], **look: Any) -> None:
    """The validation accuracy of one method against step."""
    label, colour, marker = METHODS[method]
    axes.plot(
        [s["step"] for s in scores], [s["score"] for s in scores], marker=marker, label=label, color=colour, **look
    )


def recipes_against_bytes(found: dict[str, Any], task: str) -> Figure:
    """Each recipe an arrow: from the inherited LoRA to CA-LoRA, megabytes on disk against accuracy."""
    figure, axes = blank(7.5, 4.6)
    methods = next(iter(found.values()))["methods"]
    label, colour, marker = METHODS["llm_lora"]
    whole = methods["llm_lora"]
    axes.axhline(whole["accuracy"], color=colour, lw=1, ls="--")
    axes.plot(whole["bytes_on_disk"] / 1e6, whole["accuracy"], marker, ms=9, color=colour, label=label)
    for recipe, metrics in found.items():
        before, after = (
            (m["bytes_on_disk"] / 1e6, m["accuracy"])
            for m in (metrics["methods"][k] for k in ("clm_inherited", "clm_calora"))
        )
        axes.annotate(
            "", after, before, arrowprops={"arrowstyle": "->", "color": "#999999", "shrinkA": 5, "shrinkB": 6}
        )
        for place, method in ((before, "clm_inherited"), (after, "clm_calora")):
            label, colour, marker = METHODS[method]
            axes.plot(*place, marker, ms=9, color=colour, label=label)
        axes.annotate(recipe, after, xytext=(8, -3), textcoords="offset points", fontsize=8)
    axes.set(xlabel=BYTES, ylabel="test accuracy", title=f"{task}: before and after CA-LoRA")
    axes.margins(y=0.12)
    legend_once(figure, axes)
    return figure


def front(found: dict[str, Any], task: str) -> Figure:
    """Every method of every recipe a point, and the Pareto front: what no other is both smaller and better than."""
    figure, axes = blank(7.5, 4.6)
    points = []
    for metrics in found.values():
        for method, (label, colour, marker) in METHODS.items():
            if method in metrics["methods"]:
                m = metrics["methods"][method]
                points.append((m["bytes_on_disk"] / 1e6, m["accuracy"]))
                axes.plot(*points[-1], marker, ms=7, color=colour, label=label)
    best: list[tuple[float, float]] = []
    for size, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or accuracy > best[-1][1]:
            best.append((size, accuracy))
    axes.plot(*zip(*best, strict=True), drawstyle="steps-post", color="#999999", lw=1, zorder=0)
    axes.set(xlabel=BYTES, ylabel="test accuracy", title=f"{task}: all methods")
    legend_once(figure, axes)
    return figure


def layer_errors(errors: dict[str, list[float]], title: str) -> Figure:
    """Relative error of each layer before and after the start of the bypass, a panel for each kind of layer."""
    kinds: dict[str, list[list[float]]] = {}
    for layer, pair in errors.items():
        kinds.setdefault(layer.rsplit(".", 1)[-1], []).append(pair)
    figure = Figure(figsize=(max(2.0 * len(kinds), 4.0), 2.6), layout="constrained")
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for axes, (kind, pairs) in zip(panels, kinds.items(), strict=True):
        axes.plot([before for before, _ in pairs], color=METHODS["clm"][1], ls="--", label="before")
        axes.plot([after for _, after in pairs], color=METHODS["clm_calora"][1], label="after")
        axes.set_title(kind, fontsize=9)
        axes.set_xlabel("block", fontsize=8)
        axes.locator_params(axis="x", nbins=3, integer=True)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("relative error", fontsize=8)
    panels[0].legend(fontsize=7)
    figure.suptitle(title, fontsize=10)
    return figure


def accuracy_against_bytes(metrics: dict[str, Any], title: str) -> Figure:
    """Every method a point: megabytes on disk against accuracy, with its interval."""
    figure, axes = blank(7, 4.2)
    for method, (label, colour, marker) in METHODS.items():
        if method in metrics["methods"]:
            m = metrics["methods"][method]
            size, accuracy = m["bytes_on_disk"] / 1e6, m["accuracy"]
            axes.errorbar(size, accuracy, below_and_above(m), fmt=marker, ms=9, capsize=3, label=label, color=colour)
    axes.set(xlabel=BYTES, ylabel="test accuracy", title=title)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def convergence(curves: dict[str, Any], title: str) -> Figure:
    """Validation accuracy against step, CA-LoRA and the fresh LoRAs."""
    figure, axes = blank(7, 4.2)
    for method, scores in curves.items():
        curve(axes, method, scores, ms=9)
    axes.set(xlabel="step", ylabel="validation accuracy", title=title)
    axes.legend(fontsize=8)
    return figure


def losses(parts: dict[str, list[tuple[int, float]]], title: str) -> Figure:
    """The loss of CA-LoRA and its parts against step, a panel each: part -> (step, value)."""
    figure = Figure(figsize=(2.8 * len(parts), 2.8), layout="constrained")
    panels = figure.subplots(1, len(parts), squeeze=False)[0]
    for axes, (part, points) in zip(
        panels, sorted(parts.items(), key=lambda part: (part[0] != "loss", part)), strict=True
    ):
        axes.plot(*zip(*points, strict=True), color=METHODS["clm_calora"][1], lw=1)
        axes.set(title=part, xlabel="step")
        axes.grid(alpha=0.3)
    figure.suptitle(title, fontsize=10)
    return figure


def convergences(curves: dict[str, Any], task: str) -> Figure:
    """Validation accuracy against step, a panel for each recipe."""
    figure = Figure(figsize=(3.2 * len(curves), 3.4), layout="constrained")
    panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    for axes, (recipe, methods) in zip(panels, curves.items(), strict=True):
        for method in ("clm_calora", "clm_lora"):
            curve(axes, method, methods[method])
        axes.set(title=recipe, xlabel="step")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(f"{task}: validation accuracy")
    panels[0].legend(fontsize=8)
    return figure


def ranking(scores: dict[str, dict[str, dict[str, Any]]], title: str) -> Figure:
    """A line for each name, the first at the top: the test accuracy of its methods, each with its interval."""
    figure, axes = blank(7.5, 1.6 + 0.26 * len(scores))
    for place, methods in enumerate(scores.values()):
        for method, m in methods.items():
            label, colour, marker = METHODS[method]
            axes.errorbar(
                m["accuracy"], place, xerr=below_and_above(m), fmt=marker, ms=7, capsize=3, color=colour, label=label
            )
    axes.set_yticks(range(len(scores)), list(scores), fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="test accuracy", title=title)
    if any(len(methods) > 1 for methods in scores.values()):
        legend_once(figure, axes)
    return figure
