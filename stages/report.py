"""Gather all results. Writes results/summary.json, results/table.md and the pictures in results/plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from calora.artifacts import read_json, whole_directory, write_json, write_text
from stages.common import adapter, results, run
from stages.config import Params

# In the table's order: label, colour (Okabe and Ito's palette, safe for colour-blind readers) and marker.
METHODS = {
    "llm": ("LLM", "#56B4E9", "s"),
    "llm_lora": ("LLM + LoRA (teacher)", "#009E73", "s"),
    "small_lora": ("small model + LoRA", "#CC79A7", "^"),
    "clm": ("CLM", "#000000", "v"),
    "clm_inherited": ("CLM + inherited LoRA", "#D55E00", "D"),
    "clm_lora_qk": ("CLM + LoRA (q, k)", "#999999", "P"),
    "clm_lora": ("CLM + LoRA (equal budget)", "#E69F00", "o"),
    "clm_calora": ("CLM + CA-LoRA", "#0072B2", "*"),
}


def main(params: Params) -> None:
    """One summary over every task and recipe of this run."""
    summary: dict[str, Any] = {}
    tables = []
    with whole_directory(results("plots")) as plots:
        for task in params.tasks:
            found: dict[str, Any] = {}
            for recipe in params.recipes:
                folder, made_by = adapter("evaluated", task, recipe), f"run `dvc repro evaluate@{task}-{recipe}`"
                metrics = found[recipe] = read_json(folder / "metrics.json", made_by)
                summary.setdefault(task, {})[recipe] = compact(metrics)
                tables.append(table(task, recipe, metrics))
                accuracy_against_bytes(metrics, f"{task}, {recipe}", plots / f"{task}-{recipe}-bytes.png")
                curves = read_json(folder / "curves.json", made_by)
                convergence(curves, f"{task}, {recipe}", plots / f"{task}-{recipe}-convergence.png")
            if len(found) > 1:
                tables.append(overview(task, found))
                recipes_against_bytes(found, task, plots / f"{task}-recipes.png")
    write_json(results("summary.json"), summary)
    write_text(results("table.md"), "\n\n".join(tables) + "\n")


def compact(metrics: dict[str, Any]) -> dict[str, Any]:
    """The few columns that `dvc exp show` shows."""
    methods = metrics["methods"]
    return {
        "llm_lora": methods["llm_lora"]["accuracy"],
        "clm_lora": methods["clm_lora"]["accuracy"],
        "clm_calora": methods["clm_calora"]["accuracy"],
        "gain": metrics["difference"]["value"],
        "recovered": metrics["recovered_share"]["value"],
        "mb": round(methods["clm_calora"]["bytes_on_disk"] / 1e6, 1),
    }


def table(task: str, recipe: str, metrics: dict[str, Any]) -> str:
    """All methods of one task and recipe, as a Markdown table."""
    lines = [
        f"### {task}, {recipe} ({metrics['test_items']} test items)", "",
        "| method | accuracy | 95 % interval | MB on disk | trainable |", "|---|---:|---|---:|---:|",
    ]  # fmt: skip
    for method, (label, _, _) in METHODS.items():
        if method in metrics["methods"]:
            m = metrics["methods"][method]
            interval = f"{m['ci'][0]:.3f} to {m['ci'][1]:.3f}"
            size, count = m["bytes_on_disk"] / 1e6, m["trainable_parameters"] / 1e6
            lines.append(f"| {label} | {m['accuracy']:.3f} | {interval} | {size:.1f} | {count:.2f} M |")
    difference, share = metrics["difference"], metrics["recovered_share"]
    lines += [
        "",
        f"CA-LoRA - LoRA (equal budget): {difference['value']:+.3f} [{difference['ci'][0]:+.3f}, {difference['ci'][1]:+.3f}].",
    ]
    if share["below_noise"]:
        lines.append("Recovered share: below noise (the interval of the gap touches 0).")
    else:
        lines.append(f"Recovered share of the gap: {share['value']:.2f} [{share['ci'][0]:.2f}, {share['ci'][1]:.2f}].")
    return "\n".join(lines)


def overview(task: str, found: dict[str, Any]) -> str:
    """All recipes of one task, one a line."""
    first = next(iter(found.values()))
    whole = first["methods"]["llm_lora"]
    lines = [
        f"### {task}, all recipes ({first['test_items']} test items)", "",
        "| recipe | MB with adapter | CLM | + inherited LoRA | + LoRA (q, k) | + LoRA (equal budget) | + CA-LoRA | 95 % interval | recovered share |",
        "|---|---:|---:|---:|---:|---:|---:|---|---|",
        f"| none: LLM + LoRA | {whole['bytes_on_disk'] / 1e6:.1f} | {first['methods']['llm']['accuracy']:.3f} | {whole['accuracy']:.3f} | | | | "
        f"{whole['ci'][0]:.3f} to {whole['ci'][1]:.3f} | |",
    ]  # fmt: skip
    for recipe, metrics in found.items():
        methods, share = metrics["methods"], metrics["recovered_share"]
        ours = methods["clm_calora"]
        scores = " | ".join(
            f"{methods[m]['accuracy']:.3f}" for m in ("clm", "clm_inherited", "clm_lora_qk", "clm_lora", "clm_calora")
        )
        told = (
            "below noise"
            if share["below_noise"]
            else f"{share['value']:.2f} [{share['ci'][0]:.2f}, {share['ci'][1]:.2f}]"
        )
        lines.append(
            f"| {recipe} | {ours['bytes_on_disk'] / 1e6:.1f} | {scores} | {ours['ci'][0]:.3f} to {ours['ci'][1]:.3f} | {told} |"
        )
    return "\n".join(lines)


def recipes_against_bytes(found: dict[str, Any], task: str, path: Path) -> None:
    """Each recipe an arrow: from the inherited LoRA to CA-LoRA, megabytes on disk against accuracy."""
    figure, axes = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
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
        axes.annotate(recipe, after, xytext=(0, 8), textcoords="offset points", ha="center", fontsize=8)
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    axes.set(xlabel="MB on disk (base and adapter)", ylabel="test accuracy", title=f"{task}: before and after CA-LoRA")
    axes.grid(alpha=0.3)
    axes.legend(once.values(), once.keys(), fontsize=8, loc="lower right")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def accuracy_against_bytes(metrics: dict[str, Any], title: str, path: Path) -> None:
    """Every method a point: megabytes on disk against accuracy, with its interval."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for method, (label, colour, marker) in METHODS.items():
        if method in metrics["methods"]:
            m = metrics["methods"][method]
            size, accuracy = m["bytes_on_disk"] / 1e6, m["accuracy"]
            error = [[accuracy - m["ci"][0]], [m["ci"][1] - accuracy]]
            axes.errorbar(size, accuracy, error, fmt=marker, ms=9, capsize=3, label=label, color=colour)
    axes.set(xlabel="MB on disk (base and adapter)", ylabel="test accuracy", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def convergence(curves: dict[str, Any], title: str, path: Path) -> None:
    """Validation accuracy against step, CA-LoRA and the fresh LoRAs."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for method, scores in curves.items():
        steps, accuracies = [s["step"] for s in scores], [s["score"] for s in scores]
        label, colour, marker = METHODS[method]
        axes.plot(steps, accuracies, marker=marker, ms=9, label=label, color=colour)
    axes.set(xlabel="step", ylabel="validation accuracy", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    run(main)
