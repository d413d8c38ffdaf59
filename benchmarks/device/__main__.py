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
from benchmarks import synthetic
from benchmarks.device import contexts, decode, many, soak
from benchmarks.device.setting import Setting
from benchmarks.recipes import between
from calora.common.files import read_json, write_json, write_text

PARTS: dict[str, ModuleType] = {"decode": decode, "many": many, "contexts": contexts, "soak": soak}
PAGE, DATA = Path("docs/device.md"), Path("docs/device.json")
TINY = synthetic.Size(hidden=64, inner=128, layers=2, heads=4, groups=2, vocabulary=512)


def setting_of(chosen: argparse.Namespace) -> Setting:
    """What the pipeline made."""
    from benchmarks.inference import folder_of, make
    from stages.common import BASE

    for recipe in (chosen.recipe, chosen.eight):
        make(recipe)
    models = Path("models")
    adapters = {path.parent.name: path for path in sorted(models.glob(f"calora/*/{chosen.recipe}"))}
    return Setting(
        BASE, folder_of(chosen.recipe), folder_of(chosen.eight), adapters,
        {path.name: path for path in sorted(models.glob("teacher/*"))}, Path(".cache/benchmarks/device"), tuple(chosen.counts),
        tuple(chosen.threads), chosen.rounds, chosen.requests, soak=chosen.soak,
    )  # fmt: skip


def tiny(root: Path) -> Setting:
    """Of a random model, and little of everything."""
    import torch

    from calora.adapters.lora import lora_config
    from calora.compression import compress
    from calora.compression.walk import Calibration
    from calora.models.loading import load_model
    from calora.saving import save

    base = synthetic.make(root / "base", TINY)
    for name, bits in (("four", "int4"), ("eight", "int8")):
        model = load_model(base, torch.bfloat16)
        step: dict[str, Any] = {"format": bits, "embeddings": "int8"}
        step |= {"group": 32, "symmetric": True} if bits == "int4" else {}
        save(model, compress(model, [{"quantize": step}], Calibration(synthetic.texts(2, 8, TINY.vocabulary))), root / name, base)
    from peft import get_peft_model

    teacher = get_peft_model(load_model(base, torch.bfloat16), lora_config(4, 8, ["q_proj", "v_proj"]))  # type: ignore[arg-type]
    teacher.save_pretrained(root / "teacher")
    return Setting(
        base, root / "four", root / "eight", {}, {"random": root / "teacher"}, root / "cache", counts=(1, 3), threads=(1,), rounds=1,
        requests=4, tokens=4, soak=250, mixed=3, prompts=4,
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
    parser.add_argument("--eight", default="q8", help="the one in 8 bits (q8)")
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
    data = read_json(DATA, "") if DATA.exists() else {}
    write_json(DATA, data | {part: found})
    grid = PARTS[part].table(json.loads(json.dumps(found))).grid()
    write_text(PAGE, between(PAGE.read_text(encoding="utf-8"), part, grid, "benchmarks.device"))


if __name__ == "__main__":
    main()
