"""The tables of a run, as rows, and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from stages.plots import METHODS

COMPARED = ("clm", "clm_inherited", "clm_lora_qk", "clm_lora", "clm_calora")


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


def interval(ci: list[float], sign: str = "") -> str:
    """A 95 % interval."""
    return f"[{ci[0]:{sign}.3f}, {ci[1]:{sign}.3f}]" if sign else f"{ci[0]:.3f} to {ci[1]:.3f}"


def share_of(metrics: Mapping[str, Any]) -> str:
    """The recovered share with its interval, or why there is none."""
    share = metrics["recovered_share"]
    return (
        "below noise" if share["below_noise"] else f"{share['value']:.2f} [{share['ci'][0]:.2f}, {share['ci'][1]:.2f}]"
    )


def of_methods(title: str, metrics: Mapping[str, Any]) -> Table:
    """All methods of one task and recipe."""
    table = Table(
        f"{title} ({metrics['test_items']} test items)",
        ["method", "accuracy", "95 % interval", "MB on disk", "trainable"], {0, 2},
    )  # fmt: skip
    for method, (label, _, _) in METHODS.items():
        if method in metrics["methods"]:
            m = metrics["methods"][method]
            size, count = f"{m['bytes_on_disk'] / 1e6:.1f}", f"{m['trainable_parameters'] / 1e6:.2f} M"
            table.rows.append([label, f"{m['accuracy']:.3f}", interval(m["ci"]), size, count])
    difference = metrics["difference"]
    table.notes = [
        f"CA-LoRA - LoRA (equal budget): {difference['value']:+.3f} {interval(difference['ci'], '+')}.",
        "Recovered share: below noise (the interval of the gap touches 0)."
        if metrics["recovered_share"]["below_noise"]
        else f"Recovered share of the gap: {share_of(metrics)}.",
    ]
    return table


def of_runs(title: str, first_column: str, found: Mapping[str, Mapping[str, Any]]) -> Table:
    """Recipes (or experiments) of one task, one a line, below the uncompressed LLM with its LoRA."""
    first = next(iter(found.values()))
    whole = first["methods"]["llm_lora"]
    table = Table(
        f"{title} ({first['test_items']} test items)",
        [first_column, "MB with adapter", "CLM", "+ inherited LoRA", "+ LoRA (q, k)", "+ LoRA (equal budget)", "+ CA-LoRA",
         "95 % interval", "CA-LoRA - LoRA (equal budget)", "recovered share"], {0, 7, 8, 9},
    )  # fmt: skip
    plain, size = f"{first['methods']['llm']['accuracy']:.3f}", f"{whole['bytes_on_disk'] / 1e6:.1f}"
    table.rows.append(
        ["uncompressed", size, plain, f"{whole['accuracy']:.3f}", "", "", "", interval(whole["ci"]), "", ""]
    )
    for name, metrics in found.items():
        methods, gain = metrics["methods"], metrics["difference"]
        ours = methods["clm_calora"]
        table.rows.append(
            [name, f"{ours['bytes_on_disk'] / 1e6:.1f}", *(f"{methods[m]['accuracy']:.3f}" for m in COMPARED),
             interval(ours["ci"]), f"{gain['value']:+.3f} {interval(gain['ci'], '+')}", share_of(metrics)]
        )  # fmt: skip
    return table
