"""What is served: an exported folder with as many adapters as asked for, and bases without any."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from calora.adapters.cards import plain_card
from calora.adapters.folder import read_adapter, write_adapter
from calora.adapters.lora import Adapter, lora_config
from calora.common.files import read_json, whole_directory, write_json
from calora.compressed import stored_form
from calora.device import folder as layout
from calora.device.architecture import Architecture
from calora.device.export import export
from calora.device.vocabulary import add_vocabulary
from calora.device.writer import base_tensors, write_base
from calora.inheritance.fresh import fresh_adapter
from calora.models.anatomy import linear_layers
from calora.models.loading import load_model
from calora.models.tasks import Task

SPREAD = 0.5  # of the noise in a copy, in standard deviations of its tensor
RANK = 12  # of a random adapter: as large as the default run's
FIX = "delete it, then measure again"


def made(out: Path, make: Callable[[Path], object]) -> Path:
    """A folder that is made once."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if not out.exists():
        with whole_directory(out) as scratch:
            make(scratch)
    return out


def many(compressed: Path, given: Mapping[str, Path], count: int, out: Path) -> Path:
    """An exported folder: the given adapters, then copies of them, or of a random one where there is none.

    Adapters of another base are taken as if they were this one's: neither speed nor memory knows the difference.
    """

    def make(scratch: Path) -> None:
        model, report = stored_form(compressed)
        own = {key: report[key] for key in ("base_fingerprint",)} | {"compressed_fingerprint": report["fingerprint"]}
        sources = {name: read_adapter(path) for name, path in given.items()}
        if not sources:
            config = lora_config(RANK, 2 * RANK, sorted({name.rpartition(".")[2] for name in linear_layers(model)}))
            about = {"task": TASK.to_json(), "method": "random", "activation": "identity", "recipe": "", "steps": []}
            sources = {TASK.name: perturbed(fresh_adapter(model, config, about), 0, 0.02)}
        folders, names = dict[str, Path](), list(sources)
        for number in range(count):
            name = names[number % len(names)]
            adapter = sources[name] if number < len(names) else perturbed(sources[name], number)
            folder = scratch / f"{name}{number}"
            adapter = replace(adapter, meta=adapter.meta | own)
            card = plain_card(Task.from_json(adapter.meta["task"]), "base")
            write_adapter(folder, adapter, "base", card, torch.bfloat16)
            folders[folder.name] = folder
        export(compressed, folders, scratch / "exported")

    return made(out, make) / "exported"


TASK = Task("random", "{text}\nAnswer:", (" no", " yes"), 128, 4)


def perturbed(adapter: Adapter, seed: int, least: float = 0.0) -> Adapter:
    """The same shapes, other values; `least` is the spread of what is added at least, to a B that is 0."""
    generator = torch.Generator().manual_seed(seed)

    def other(tensor: torch.Tensor) -> torch.Tensor:
        spread = max(SPREAD * float(tensor.float().std()), least)
        return tensor + spread * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)

    def others(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: other(tensor) for name, tensor in tensors.items()}

    return replace(adapter, lora=others(adapter.lora), recovery=others(adapter.recovery))


def first(folder: Path, count: int, out: Path) -> Path:
    """An exported folder with the first adapters of another one; without any it is a merged model of that base: no LoRA is on."""

    def make(scratch: Path) -> None:
        about = read_json(folder / layout.MANIFEST, FIX)
        adapters = dict(list(about["adapters"].items())[:count])
        apply = about["base"]["apply"] if count else []
        kept = {about["base"]["file"], *apply, *(file for entry in adapters.values() for file in entry["apply"])}
        files = {name: entry for name, entry in about["files"].items() if name in kept}
        for name in files:
            (scratch / name).parent.mkdir(exist_ok=True)
            os.link(folder / name, scratch / name)
        base = about["base"] | {"apply": apply}
        write_json(scratch / layout.MANIFEST, about | {"adapters": adapters, "files": files, "base": base})

    return made(out, make)


def plain(base: Path, out: Path) -> Path:
    """An exported folder of an uncompressed model: what a merged one is, but for its values."""

    def make(scratch: Path) -> None:
        model = load_model(base, torch.bfloat16)
        architecture = Architecture.of(model.config)
        tensors, _ = base_tensors(model, architecture)
        entries = {"compressed_fingerprint": "none", "base_fingerprint": "none"}
        rows = model.config.vocab_size
        write_base(
            scratch / layout.BASE, architecture, tensors, entries, lambda writer: add_vocabulary(writer, base, rows)
        )
        about = {
            "version": layout.VERSION, "context": architecture.context, "compressed_fingerprint": "none", "base_fingerprint": "none",
            "files": layout.files_of(scratch, {}), "base": {"file": layout.BASE, "apply": []}, "adapters": {},
        }  # fmt: skip
        write_json(scratch / layout.MANIFEST, about)

    return made(out, make)


def copy(folder: Path, out: Path) -> Path:
    """The same files once more: what two models have alike on a disk, they would share in memory."""
    return made(out, lambda scratch: shutil.copytree(folder, scratch, dirs_exist_ok=True))


def bytes_of(folder: Path) -> int:
    """Of all files of an exported folder."""
    return sum(int(entry["bytes"]) for entry in read_json(folder / layout.MANIFEST, FIX)["files"].values())
