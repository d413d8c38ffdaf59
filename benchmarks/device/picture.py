"""The picture of docs/device.md: how fast one answer is written, and what N tasks take in memory."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.device import decode, many
from stages.looks import LOOKS

OURS = LOOKS["clm_calora"].colour
# In the order of the legend: colour, marker
LINES = {
    many.OURS: (OURS, "*"),
    many.MERGED["4-bit"]: (LOOKS["clm_lora"].colour, "o"),
    many.MERGED["bf16"]: (LOOKS["clm_inherited"].colour, "D"),
    many.PEFT: (LOOKS["llm_lora"].colour, "s"),
}


def picture(found: dict[str, Any]) -> Figure:
    """Both panels; `found` is what the parts `decode` and `many` measured, by part."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    speed, memory = figure.subplots(1, 2, width_ratios=(1, 1.2))
    speeds(speed, found["decode"]["rows"])
    memories(memory, found["many"]["rows"])
    return figure


def speeds(axes: Axes, rows: list[list[Any]]) -> None:
    """A bar for each model: the best of all numbers of threads and ways to wait, and how many times PEFT's."""
    best: dict[str, float] = {}
    for model, _, _, rates in rows:
        best[model] = max(best.get(model, 0.0), *rates)
    names = list(reversed(best))
    colours = [LINES[many.PEFT][0] if name == decode.PEFT else OURS for name in names]
    bars = axes.barh([name.replace(", ", ",\n") for name in names], [best[name] for name in names], color=colours)
    axes.bar_label(bars, [f"{best[name]:.0f} ({best[name] / best[decode.PEFT]:.1f}x)" for name in names], padding=3)
    axes.set(xlabel="tokens/s of one answer", xlim=(0, 1.3 * max(best.values())))
    axes.tick_params(axis="y", labelsize=8)
    axes.grid(axis="x", alpha=0.3)


def memories(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """A line for each way to have N tasks; what was computed has no marker."""
    for what, (colour, marker) in LINES.items():
        own = list({row["count"]: row for row in rows if row["what"] == what}.values())
        places = [(row["count"], row["memory_mb"]) for row in own]
        measured = [place for place, row in zip(places, own, strict=True) if "computed" not in row]
        axes.plot(*zip(*places, strict=True), color=colour, lw=1.2)
        axes.plot(*zip(*measured, strict=True), marker, color=colour, ms=8, label=what)
    counts = sorted({row["count"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set(xlabel="tasks on the device", ylabel="MB in memory")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
