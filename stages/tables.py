"""The tables of a run, as rows, and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stages.looks import METRICS, look_of
from stages.scored import metric_of, value_of


@dataclass
class Table:
    """Cells, row by row; `texts` columns are set to the left; `notes` stand below."""

    title: str
    header: list[str]
    texts: set[int]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def grid(self) -> str:
        """The cells as Markdown."""
        marks = ["---" if i in self.texts else "---:" for i in range(len(self.header))]
        lines = [f"| {' | '.join(row)} |" for row in (self.header, *self.rows)]
        lines.insert(1, f"|{'|'.join(marks)}|")
        return "\n".join(lines)

    def markdown(self) -> str:
        """Title, cells and notes as Markdown."""
        notes = ["", *self.notes] if self.notes else []
        return "\n".join([f"### {self.title}", "", self.grid(), *notes])


def interval(ci: Sequence[float], sign: str = "") -> str:
    """A 95 % interval."""
    return f"[{ci[0]:{sign}.3f}, {ci[1]:{sign}.3f}]" if sign else f"{ci[0]:.3f} to {ci[1]:.3f}"


def share_of(metrics: Mapping[str, Any]) -> str:
    """A recovered share with its interval, or why there is none."""
    share = metrics.get("recovered_share")
    if share is None:
        return ""
    if share["below_noise"]:
        return "below noise"
    return f"{share['value']:.2f} [{share['ci'][0]:.2f}, {share['ci'][1]:.2f}]"


def gain_of(metrics: Mapping[str, Any]) -> str:
    """A difference to the baseline with its interval; empty where there is none."""
    gain = metrics.get("difference")
    return "" if gain is None else f"{gain['value']:+.3f} {interval(gain['ci'], '+')}"


def with_metric(task: str, metrics: Mapping[str, Any]) -> str:
    """A task, and the metric that counts where that is not accuracy."""
    metric = metric_of(metrics)
    return task if metric == "accuracy" else f"{task} ({METRICS[metric]})"


def short(key: str) -> str:
    """A method's label as the head of a column."""
    return look_of(key).label.replace("CLM + ", "+ ")


def of_methods(title: str, metrics: Mapping[str, Any]) -> Table:
    """All methods of one task and recipe, with the metric that counts and its interval, and then the others."""
    first, *others = metrics.get("metrics", [metric_of(metrics)])
    table = Table(
        f"{title} ({metrics['test_items']} test items)",
        ["method", METRICS[first], "95 % interval", *(METRICS[metric] for metric in others), "MB on disk", "trainable"], {0, 2},
    )  # fmt: skip
    for method, m in metrics["methods"].items():
        size, count = f"{m['bytes_on_disk'] / 1e6:.1f}", f"{m['trainable_parameters'] / 1e6:.2f} M"
        beside = [f"{m[metric]:.3f}" for metric in others]
        table.rows.append([look_of(method).label, f"{value_of(m):.3f}", interval(m["ci"]), *beside, size, count])
    table.notes = list(notes_of(metrics))
    return table


def notes_of(metrics: Mapping[str, Any]) -> Iterator[str]:
    """What is said below a table of methods: the gain, the share of the gap, and the scores with packed weights."""
    ours, baseline = (look_of(metrics[key]).label.removeprefix("CLM + ") for key in ("ours", "baseline"))
    if "difference" in metrics:
        yield f"{ours} - {baseline}: {gain_of(metrics)}."
    if "recovered_share" in metrics:
        noise = metrics["recovered_share"]["below_noise"]
        yield (
            "Recovered share: below noise (the interval of the gap touches 0)."
            if noise
            else f"Recovered share of the gap: {share_of(metrics)}."
        )
    for method, m in metrics["methods"].items():
        if "packed" in m:
            yield f"{look_of(method).label} with packed weights, as they are shipped: {m['packed']:.3f}."


def of_runs(title: str, first_column: str, found: Mapping[str, Mapping[str, Any]]) -> Table:
    """Recipes (or experiments) of one task, one a line, below the uncompressed LLM with its LoRA."""
    first = next(iter(found.values()))
    whole, ours = first["methods"]["llm_lora"], first["ours"]
    keys = list(dict.fromkeys(key for one in found.values() for key in one["methods"] if key.startswith("clm")))
    gain = f"{short(ours)} - {short(first['baseline'])}".replace("+ ", "")
    table = Table(
        f"{with_metric(title, first)} ({first['test_items']} test items)",
        [first_column, f"MB with {short(ours).removeprefix('+ ')}", *map(short, keys), "95 % interval", gain, "recovered share"],
        {0, len(keys) + 2, len(keys) + 3, len(keys) + 4},
    )  # fmt: skip
    beside = {"clm": first["methods"]["llm"], "clm_inherited": whole}
    scores = [f"{value_of(beside[key]):.3f}" if key in beside else "" for key in keys]
    table.rows.append(["uncompressed", f"{whole['bytes_on_disk'] / 1e6:.1f}", *scores, interval(whole["ci"]), "", ""])
    for name, metrics in found.items():
        methods = metrics["methods"]
        own = methods.get(ours)
        scores = [f"{value_of(methods[key]):.3f}" if key in methods else "" for key in keys]
        size, ci = (f"{own['bytes_on_disk'] / 1e6:.1f}", interval(own["ci"])) if own else ("", "")
        table.rows.append([name, size, *scores, ci, gain_of(metrics), share_of(metrics)])
    return table
