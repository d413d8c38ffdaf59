"""Tokens a second of one answer: transformers and PEFT in bf16, and llama.cpp with the compressed base and an adapter.

All wait in processes of their own, and are asked in turn, round by round, so that what else the machine does hits them alike.
"""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from typing import Any

from benchmarks.device.processes import Worker
from benchmarks.device.setting import Setting
from stages.tables import Table

PEFT = "transformers + PEFT, bf16"
# How often a thread of OpenMP asks whether the others have come before it sleeps: as libgomp does by itself, as `calora serve`
# has it, and never.
SPINS = ("300000", "1000", "0")


def workers(setting: Setting) -> dict[tuple[str, int, str], dict[str, Any]]:
    """(model, threads, spins) -> what a worker is."""
    models = {f"llama.cpp, {name} + adapter": folder for name, folder in setting.with_an_adapter().items()}
    teachers = [str(path) for path in setting.teachers.values()]
    found: dict[tuple[str, int, str], dict[str, Any]] = {}
    for threads in setting.threads:
        found[PEFT, threads, ""] = {"kind": "peft", "base": str(setting.base), "adapters": teachers, "count": 1}
        for name, folder in models.items():
            for spins in SPINS if threads > 1 else ("",):
                environment = {"GOMP_SPINCOUNT": spins} if spins else {}
                found[name, threads, spins] = {"kind": "llama", "folder": str(folder), "environment": environment}
        for key in found:
            found[key].setdefault("threads", key[1])
    return found


def measure(setting: Setting) -> dict[str, Any]:
    """Tokens a second of each row, round by round."""
    rows = workers(setting)
    rates: dict[tuple[str, int, str], list[float]] = {key: [] for key in rows}
    with ExitStack() as stack:
        started = {key: stack.enter_context(Worker(**options)) for key, options in rows.items()}
        for _ in range(setting.rounds):
            for key, worker in started.items():
                rates[key].append(worker("decode"))
    return {"rows": [[*key, found] for key, found in rates.items()]}


def table(found: dict[str, Any]) -> Table:
    """The best of the rounds, their median, and the ratio of the best to PEFT's with as many threads."""
    made = Table("decode", ["model", "threads", "GOMP_SPINCOUNT", "tokens/s", "median", "times PEFT"], {0})
    peft = {threads: max(rates) for model, threads, _, rates in found["rows"] if model == PEFT}
    for model, threads, spins, rates in found["rows"]:
        best = max(rates)
        cells = [f"{best:.0f}", f"{statistics.median(rates):.0f}", f"{best / peft[threads]:.1f}"]
        made.rows.append([model, str(threads), spins, *cells])
    return made
