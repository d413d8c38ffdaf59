"""N tasks at a time: one base with N adapters, N merged models that are served side by side, and PEFT's N adapters."""

from __future__ import annotations

import asyncio
import random
import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.device import folders
from benchmarks.device.client import Target, ask, load
from benchmarks.device.processes import Served, Worker
from benchmarks.device.setting import Setting
from stages.tables import Table

CLIENTS = (1, 4)
OURS, PEFT = "one base, N adapters", "transformers + PEFT, bf16"
MERGED = {"4-bit": "N merged models, 4-bit", "bf16": "N merged models, bf16"}
Found = dict[str, Any]


def measure(setting: Setting) -> Found:
    """All rows."""
    rows: list[Found] = []

    def told(what: str, count: int, found: Found) -> None:
        rows.append({"what": what, "count": count, "threads": setting.threads[0], **found})
        print(what, count, found, file=sys.stderr, flush=True)

    for count in setting.counts:
        told(OURS, count, served(setting, [setting.exported(count)]))
    for kind, places in setting.merged().items():
        run = {count: served(setting, places[:count]) for count in setting.counts if count <= len(places)}
        for count in setting.counts:
            told(MERGED[kind], count, run[count] if count in run else computed(run, count))
    for count in setting.counts:
        told(PEFT, count, of_peft(setting, count))
    return {"rows": rows}


def served(setting: Setting, places: Sequence[Path]) -> Found:
    """A server a folder: memory, loads over all adapters (or the bases of folders without any), a switch."""
    with ExitStack() as stack:
        servers = [stack.enter_context(Served(folder, setting.threads[0])) for folder in places]
        return {"files_mb": sum(map(folders.bytes_of, places)) / 1e6, **asyncio.run(_measured(setting, servers))}


async def _measured(setting: Setting, servers: Sequence[Served]) -> Found:
    async with AsyncExitStack() as stack:
        targets: list[Target] = []
        for server in servers:
            client = await stack.enter_async_context(server.client())
            names = [one["id"] for one in (await client.get("/models")).json()["data"]]
            targets += [(client, name) for name in names[1:] or names]
        await load(1, len(targets), 2, targets.__getitem__)  # so that all of it is in memory
        found: Found = {"memory_mb": sum(server.memory for server in servers)}
        rng = random.Random(1)
        for clients in CLIENTS:
            for name, some in (("alone", targets[:1]), ("mixed", targets)):
                found[f"{name}_{clients}"] = await load(
                    clients, setting.requests, setting.tokens, partial(_any_of, rng, some)
                )
        if len(targets) > len(servers):
            found["switch_ms"] = await _switch(setting, targets[:2])
        return found


def _any_of(rng: random.Random, some: Sequence[Target], _: int) -> Target:
    return rng.choice(some)


async def _switch(setting: Setting, pair: Sequence[Target]) -> float:
    """What the median to the first token is later of requests for another adapter than the last one's; every second one is."""
    rng, firsts = random.Random(2), (list[float](), list[float]())
    for number in range(4 * setting.requests):
        firsts[number % 2].append((await ask(pair[(number + 1) // 2 % 2], 1, rng))[0])
    same, other = (statistics.median(some) for some in firsts)
    return 1000 * (other - same)


def computed(run: Mapping[int, Found], count: int) -> Found:
    """Of more servers than run side by side: each further one takes what those that ran took; speeds are theirs."""
    most = max(run)
    each = run[most]["memory_mb"] / most
    return run[most] | {"memory_mb": each * count, "files_mb": run[most]["files_mb"] / most * count, "computed": True}


def of_peft(setting: Setting, count: int) -> Found:
    """A process with the base and so many LoRAs, one request at a time."""
    teachers = [str(path) for path in setting.teachers.values()]
    options: dict[str, Any] = {
        "base": str(setting.base),
        "adapters": teachers,
        "count": count,
        "threads": setting.threads[0],
    }
    with Worker("peft", **options) as worker:
        worker("load", requests=1, tokens=2, mixed=False)
        found: Found = {"memory_mb": worker.memory}
        for name in ("alone", "mixed"):
            found[f"{name}_1"] = worker("load", requests=setting.requests, tokens=setting.tokens, mixed=name == "mixed")
        return found | {"switch_ms": found["mixed_1"]["switch_ms"]}


def table(found: Found) -> Table:
    """A line for each way and number of tasks."""
    heads = ["", "tasks", "threads", "MB in memory", "MB of files", "switch, ms"]
    loads = ("alone_1", "mixed_1", "alone_4", "mixed_4")
    heads += ["requests/s: one client, one task", "mixed", "four clients, one task", "mixed"]
    heads += ["first token, ms, p95: one client, mixed", "four clients, mixed"]
    made = Table("many", heads, {0})
    for row in found["rows"]:
        switch = f"{row['switch_ms']:.1f}" if "switch_ms" in row else "0" if row["what"] in MERGED.values() else ""
        files = f"{row['files_mb']:.0f}" if "files_mb" in row else ""
        cells = [
            row["what"],
            str(row["count"]),
            str(row["threads"]),
            f"{row['memory_mb']:,.0f}{', computed' * ('computed' in row)}",
            files,
            switch,
        ]
        cells += [f"{row[name]['requests_per_second']:.1f}" if name in row else "" for name in loads]
        cells += [f"{row[name]['p95_ms']:,.0f}" if name in row else "" for name in ("mixed_1", "mixed_4")]
        made.rows.append(cells)
    return made
