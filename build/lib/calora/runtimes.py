"""`calora.load`: a compressed model with its adapters, computed by torch, by llama.cpp, or by the faster of the two here."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, overload

from calora.common.files import read_json, sha256
from calora.device.folder import MANIFEST
from calora.device.runtime import installed, library
from calora.errors import CaloraError
from calora.evaluation.choice import Choice
from calora.models.tasks import Task

if TYPE_CHECKING:  # torch and llama.cpp are loaded when they are chosen
    from calora.compressed import Compressed
    from calora.device.llama import Llama

Runtime = Literal["torch", "llama", "auto"]
RUNTIMES: tuple[Runtime, ...] = ("torch", "llama", "auto")


class Model(Protocol):
    """What a compressed model can do in every runtime."""

    def load_adapter(self, path: str | Path, name: str) -> None:
        """Load an adapter's folder; the first becomes active."""

    def unload_adapter(self, name: str) -> None:
        """Take it off."""

    def set_adapter(self, name: str | None) -> None:
        """Switch to it; None: the compressed model alone."""

    def answer(self, texts: Sequence[str | Mapping[str, Any]]) -> list[str]:
        """Answers of the active adapter's task: to texts, or to rows with the prompt's columns."""

    def choose(self, texts: Sequence[str | Mapping[str, Any]]) -> list[Choice]:
        """The same with how probable each answer is, where the task gives them."""

    def complete(self, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        """What it writes behind each prompt, greedily."""


@overload
def load(
    path: str | Path,
    adapter: str | Path | None = ...,
    *,
    runtime: Literal["torch"] = ...,
    threads: None = ...,
    **options: Any,
) -> Compressed: ...
@overload
def load(
    path: str | Path, adapter: str | Path | None = ..., *, runtime: Literal["llama"], threads: int | None = ...
) -> Llama: ...
@overload
def load(
    path: str | Path, adapter: str | Path | None = ..., *, runtime: Runtime, threads: int | None = ..., **options: Any
) -> Model: ...
def load(
    path: str | Path,
    adapter: str | Path | None = None,
    *,
    runtime: Runtime = "torch",
    threads: int | None = None,
    **options: Any,
) -> Model:
    """Open a compressed model: it takes adapters, answers rows of their tasks, and writes.

    Args:
        path: a folder that the compress stage (or `calora.save`) wrote; or one that `calora export` wrote, for llama.cpp.
        adapter: an adapter's folder, which is loaded by its task's name and active; of an exported folder, a name.
        runtime: `torch` (a model of transformers); `llama` (llama.cpp: of a compressed model a base.gguf is made once, in
            the cache folder); `auto`: whichever answers this adapter's task faster here (without an adapter: writes
            faster), which is measured once and remembered in the cache folder. CALORA_CACHE names another one.
        threads: of llama.cpp; by default as many as it takes, under `auto` as many as torch.
        options: of torch, see `calora.compressed.load`. Under `auto` torch computes with the dense view.

    Raises:
        CaloraError: there is no such runtime, a folder is not what it should be, a package is missing, or llama.cpp cannot
            have this base.
    """
    if runtime not in RUNTIMES:
        raise CaloraError("runtime", f"one of {', '.join(RUNTIMES)}", runtime, "choose one of them")
    base, export = Path(path), (Path(path) / MANIFEST).exists()
    if runtime == "torch" and export:
        fix = "name the folder of the compressed model, or runtime='llama'"
        raise CaloraError(f"load {path}", "a compressed model, for torch", "an export", fix)
    if runtime == "torch":
        return _in_torch(base, adapter, options)
    if runtime == "llama" or export:
        if options:
            raise CaloraError("load", "options that llama.cpp has", next(iter(options)), "leave it out")
        return _in_llama(base, adapter, threads)
    return _faster(base, adapter, threads, options)


def _in_torch(base: Path, adapter: str | Path | None, options: Mapping[str, Any]) -> Compressed:
    from calora.compressed import load

    model = load(base, **options)
    if adapter is not None:
        model.load_adapter(adapter, task_of(adapter).name)
    return model


def _in_llama(base: Path, adapter: str | Path | None, threads: int | None) -> Llama:
    library()
    with installed():
        from calora.device.llama import Llama
    if (base / MANIFEST).exists():
        model = Llama(base, threads=threads)
        model.set_adapter(None if adapter is None else str(adapter))
        return model
    with installed():
        from calora.device.cache import exported
        from calora.device.export import export_adapter

    model = Llama(exported(base), partial(export_adapter, base), threads=threads)
    if adapter is not None:
        model.load_adapter(adapter, task_of(adapter).name)
    return model


def _faster(base: Path, adapter: str | Path | None, threads: int | None, options: Mapping[str, Any]) -> Model:
    import torch

    options = {"dense": True, **options}
    if options.get("device", "cpu") != "cpu":
        print(f"calora: torch, which is the one that computes on {options['device']}", file=sys.stderr)
        return _in_torch(base, adapter, options)
    threads = threads or torch.get_num_threads()
    ways: dict[str, Callable[[], Model]] = {
        "torch": partial(_in_torch, base, adapter, options),
        "llama": partial(_in_llama, base, adapter, threads),
    }
    try:
        library()
        with installed():
            from calora.device.faster import faster
        return faster(_fingerprint(base), None if adapter is None else task_of(adapter), threads, ways)
    except CaloraError as error:
        model = ways["torch"]()  # whose mistakes are told first
        print(f"calora: torch, because llama.cpp is no way here: {error}", file=sys.stderr)
        return model


def named(folder: Path, adapter: str | None) -> tuple[str, Task, list[str]]:
    """(adapter, its task, what tells base and adapter from others), of a compressed model or of an export, before either is opened.

    Args:
        adapter: as of `load`; of an export None is the only one that chooses among answers.

    Raises:
        CaloraError: there is no such adapter.
    """
    if (folder / MANIFEST).exists():
        with installed():
            from calora.device.table import of_export
        return of_export(folder, adapter)
    if adapter is None:
        fix = "name one: --adapter FOLDER"
        raise CaloraError("adapter", "the folder of an adapter for this model", "none", fix)
    from calora.adapters.folder import META

    return adapter, task_of(adapter), [_fingerprint(folder), sha256(Path(adapter) / META)]


def _fingerprint(base: Path) -> str:
    from calora.saving import REPORT

    return str(read_json(base / REPORT, "name the folder of a compressed model, or of an export")["fingerprint"])


def task_of(adapter: str | Path) -> Task:
    """The task of an adapter's folder; raises `CaloraError` where it is none."""
    from calora.adapters.folder import META
    from calora.adapters.prompts import task_of

    return task_of(adapter, read_json(Path(adapter) / META, "name the folder of an adapter").get("task") or {})
