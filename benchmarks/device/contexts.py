"""One context that switches between adapters, and a context for each: `benchmarks.device.native` in a process of its own."""

from __future__ import annotations

from typing import Any

from benchmarks.device.processes import Worker
from benchmarks.device.setting import Setting
from stages.tables import Table


def measure(setting: Setting) -> dict[str, Any]:
    """A line for each number of adapters."""
    rows = []
    for count in setting.counts:
        with Worker("contexts", folder=str(setting.exported(count)), threads=setting.threads[0]) as worker:
            rows.append({"count": count, **worker("compare")})
    return {"rows": rows}


def table(found: dict[str, Any]) -> Table:
    """ms a token, and what contexts take."""
    heads = [
        "adapters in memory",
        "ms a token, one context, one adapter",
        "switching at every token",
        "of which the switch",
    ]
    made = Table(
        "contexts", [*heads, "a context each, in turn", "MB of one context", "MB of each, eight at most"], set()
    )
    for row in found["rows"]:
        switch = row["turns_ms"] - row["same_ms"]
        cells = [row["same_ms"], row["turns_ms"], switch, row["own_ms"]]
        sizes = [f"{row['one_mb']:.0f}", f"{row['each_mb']:.0f}"]
        made.rows.append([str(row["count"]), *(f"{cell:.1f}" for cell in cells), *sizes])
    return made
