"""The command: `python -m benchmarks.device PART [PART ...]`; see `benchmarks.device`."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import benchmarks.device
from benchmarks.device import contexts, decode, many, soak
from benchmarks.device.picture import picture
from benchmarks.device.setting import Setting
from benchmarks.device.tiny import tiny
from benchmarks.recipes import between
from calora.common.files import read_json, write_json, write_text

PARTS: dict[str, ModuleType] = {"decode": decode, "many": many, "contexts": contexts, "soak": soak}
PAGE, DATA, PICTURE = Path("docs/device.md"), Path("docs/device.json"), Path("docs/device.png")


def setting_of(chosen: argparse.Namespace) -> Setting:
    """What the pipeline made."""
    from benchmarks.inference import folder_of, make
    from stages.common import BASE

    others = chosen.others if "decode" in chosen.parts else []
    for recipe in (chosen.recipe, *others):
        make(recipe)
    models = Path("models")
    adapters = {path.parent.name: path for path in sorted(models.glob(f"calora/*/{chosen.recipe}"))}
    return Setting(
        BASE, folder_of(chosen.recipe), {recipe: folder_of(recipe) for recipe in others}, adapters,
        {path.name: path for path in sorted(models.glob("teacher/*"))}, Path(".cache/benchmarks/device"), tuple(chosen.counts),
        tuple(chosen.threads), chosen.rounds, chosen.requests, soak=chosen.soak,
    )  # fmt: skip


def machine() -> dict[str, Any]:
    """What it was measured on."""
    names = [line.partition(": ")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return {
        "processor": names[0] if names else platform.processor(), "cores": os.cpu_count(), "busy": round(os.getloadavg()[1], 1),
        **{name: version(name) for name in ("xllamacpp", "torch", "transformers", "peft")},
    }  # fmt: skip


def main(arguments: list[str] | None = None, said: Callable[[str], None] = print) -> None:
    """Measure the parts, and write them down; of a tiny model they are said only."""
    parser = argparse.ArgumentParser(
        description=benchmarks.device.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="+", choices=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--recipe", default="q3", help="of params.yaml: the base that is served (q3)")
    parser.add_argument(
        "--others", nargs="*", default=["device", "q8"], help="recipes beside it in `decode` (device q8)"
    )
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 4, 16, 64], help="of adapters")
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[2, 1], help="rows of `decode`; of all other parts the first"
    )
    parser.add_argument("--rounds", type=int, default=5, help="of `decode` (5)")
    parser.add_argument("--requests", type=int, default=60, help="of each load of `many` (60)")
    parser.add_argument("--soak", type=int, default=10_000, help="requests of the soak (10000)")
    parser.add_argument("--tiny", action="store_true", help="a random model, a few requests; nothing is written")
    chosen = parser.parse_args(arguments)
    with TemporaryDirectory() as root:
        setting = tiny(Path(root)) if chosen.tiny else setting_of(chosen)
        for part in chosen.parts:
            before = machine()
            found = {**PARTS[part].measure(setting), "setting": setting.told(), "machine": before}
            if chosen.tiny:
                said(PARTS[part].table(found).grid())
            else:
                write(part, found)


def write(part: str, found: dict[str, Any]) -> None:
    """Keep what was measured, and show it."""
    data = (read_json(DATA, "") if DATA.exists() else {}) | {part: found}
    write_json(DATA, data)
    if {"decode", "many"} <= data.keys():
        picture(data).savefig(PICTURE, dpi=130)
    grid = PARTS[part].table(json.loads(json.dumps(found))).grid()
    write_text(PAGE, between(PAGE.read_text(encoding="utf-8"), part, grid, "benchmarks.device"))


if __name__ == "__main__":
    main()
