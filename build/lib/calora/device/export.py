"""Export a base with its adapters for other runtimes: GGUF for llama.cpp, plain folders for transformers, PEFT and vLLM."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from calora.adapters.cards import plain_card
from calora.adapters.fold import fold, of_one_rank, shared_lora
from calora.adapters.folder import read_adapter, write_adapter
from calora.adapters.lora import Adapter
from calora.common.files import alone, extended_directory, read_json, whole_directory, write_json, write_text
from calora.common.versions import versions
from calora.compressed import stored_form
from calora.device import folder as layout
from calora.device.architecture import Architecture
from calora.device.blocks import REQUANTISED, count_types
from calora.device.card import export_card
from calora.device.catalogue import BASE_NAME
from calora.device.dense import dtype_of, write_dense
from calora.device.plain import read_plain, read_uncompressed
from calora.device.runtime import library
from calora.device.score import adapter_file, compared, encoded, llama_hits, peft_hits, plain_hits, torch_hits
from calora.device.vocabulary import add_vocabulary
from calora.device.writer import ADAPTER_TYPES, adapter_tensors, base_tensors, told, write_base, write_lora
from calora.errors import CaloraError
from calora.models.loading import load_tokenizer
from calora.models.tasks import Row, Task
from calora.saving import REPORT

KINDS = ("gguf", "peft")
PLACES = ("beside", "inside")


@dataclass(frozen=True)
class Source:
    """What is exported.

    Args:
        path: folder of the base.
        model: in its stored form.
        report: its compression.json; of an uncompressed base what `read_uncompressed` says.
        tokenizer: its own.
        shared: its recovery, as a LoRA; without layers where it has none.
        adapters: name -> folded adapter, with what its calora.json says.
        paths: name -> folder of the adapter.
    """

    path: Path
    model: PreTrainedModel
    report: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase
    shared: Adapter
    adapters: dict[str, Adapter]
    paths: dict[str, Path]

    @property
    def tasks(self) -> dict[str, Task]:
        """Name -> task."""
        return {name: Task.from_json(adapter.meta["task"]) for name, adapter in self.adapters.items()}


def export(
    base: str | Path,
    adapters: Mapping[str, str | Path] | Iterable[str | Path],
    out: str | Path,
    *,
    kinds: Sequence[str] = ("gguf",),
    requantise: str | None = None,
    adapter_type: str = "BF16",
    recovery: str = "beside",
    tasks: Mapping[str, Task] | None = None,
    tests: Mapping[str, Sequence[Row]] | None = None,
    hits: Mapping[str, Sequence[int]] | None = None,
    draws: int = 2000,
    seed: int = 0,
    threads: int | None = None,
    add: bool = False,
) -> dict[str, Any]:
    """Write a folder that other runtimes serve (`calora.device.folder` describes it), whole or not at all.

    base.gguf has the compressed model's numbers (int8 in Q8_0, symmetric int4, int3 and int2 in Q4_0, asymmetric int4 in
    Q5_0); an adapter is the LoRA that its linear form folds into (`calora.fold`).

    Args:
        base: a compressed model; or an uncompressed one with plain LoRAs of PEFT, to compare with.
        adapters: adapter folders, by name or by the names of their tasks (plain LoRAs: of their folders).
        out: the folder to write; an earlier export there is replaced.
        kinds: `gguf` (llama.cpp) and `peft` (dense/ and peft/NAME: transformers, PEFT, vLLM).
        requantise: round layers that no type of GGUF holds exactly to this one, such as Q8_0; the card names them.
        adapter_type: of the LoRAs in GGUF: BF16, F16, F32 or Q8_0.
        recovery: where the base's recovery goes, if it has one: `beside` (recovery.gguf, on under every adapter; in dense/)
            or `inside` (each adapter: faster, larger files; recovery.gguf is for the base alone).
        tasks: plain LoRA -> its task, which its folder does not say.
        tests: adapter -> labelled rows: it is scored on them, and the card says so.
        hits: adapter -> whether the torch model is right on each of these rows, where that is known already.
        draws, seed: of the bootstrap.
        threads: of llama.cpp.
        add: to the export that is there, of the same base; `kinds`, `requantise` and `recovery` are those that it has.
            No other file is written but manifest.json and README.md, and until the end it is what it was.

    Returns:
        What manifest.json holds.

    Raises:
        CaloraError: an argument is none of these, a file is broken, an adapter is another base's or not linear, a layer has
            no exact type, llama.cpp has no such architecture or tokenizer, tests are given and xllamacpp is not installed,
            or what is there cannot be added to.
    """
    out = Path(out)
    with alone(out):  # of two that add an adapter each, one would be lost
        there = layout.read_folder(out) if add else None
        if there:
            kinds, recovery = _kinds(there), there.get("recovery", "not said")
        _check(out, kinds, adapter_type, recovery, requantise)
        if tests and "gguf" in kinds:
            library()
        source = read_source(Path(base), adapters, tasks or {})
        if unknown := sorted(set(tests or {}) - set(source.adapters)):
            raise CaloraError("tests", f"names among {', '.join(source.adapters)}", unknown[0], "name an adapter")
        with extended_directory(out, layout.MANIFEST) if there else whole_directory(out) as scratch:
            about = _extended(there, source, out) if there else _about(source, recovery)
            if "gguf" in kinds:
                _write_gguf(scratch, about, source, requantise, adapter_type)
            if "peft" in kinds:
                _write_peft(scratch, about, source, out)
            about["files"] = layout.files_of(scratch, about["files"])
            write_json(scratch / layout.MANIFEST, about)
            if tests:
                _score(scratch, about, source, tests, hits, draws, seed, threads)
            write_json(scratch / layout.MANIFEST, about)
            write_text(scratch / layout.CARD, export_card(about))
    return about


def _check(out: Path, kinds: Sequence[str], adapter_type: str, recovery: str, requantise: str | None) -> None:
    for name, found, known in (
        ("kinds", kinds, KINDS),
        ("adapter_type", [adapter_type], tuple(ADAPTER_TYPES)),
        ("recovery", [recovery], PLACES),
        ("requantise", [requantise or REQUANTISED[0]], REQUANTISED),
    ):
        wrong = [one for one in found if one not in known]
        if wrong or not found:
            raise CaloraError(name, f"one of {', '.join(known)}", wrong[0] if wrong else "none", "choose one of them")
    if out.exists() and not (out / layout.MANIFEST).exists() and (not out.is_dir() or any(out.iterdir())):
        raise CaloraError(out, "a new folder, or an earlier export", "something else", "name another folder")


def read_source(
    base: Path, adapters: Mapping[str, str | Path] | Iterable[str | Path], tasks: Mapping[str, Task]
) -> Source:
    """Read all that is exported, before anything is written."""
    compressed = (base / REPORT).exists()
    model, report = stored_form(base) if compressed else read_uncompressed(base)
    named: list[tuple[str | None, Path]] = (
        [(name, Path(path)) for name, path in adapters.items()]
        if isinstance(adapters, Mapping)
        else [(None, Path(path)) for path in adapters]
    )
    folded: dict[str, Adapter] = {}
    paths: dict[str, Path] = {}
    for given, path in named:
        adapter = (
            read_folded(base, report["fingerprint"], path)
            if compressed
            else _folded(read_plain(path, given, model, tasks), path)
        )
        name = given or (str(adapter.meta["task"]["name"]) if compressed else path.name)
        if not re.fullmatch(layout.NAME, name) or name in [*folded, BASE_NAME]:
            found = f"{name!r}{', twice' if name in folded else ''}"
            raise CaloraError(
                f"adapter {path}", "a name of letters, digits, _ and - of its own", found, "name it: NAME=FOLDER"
            )
        folded[name], paths[name] = adapter, path
    if unknown := sorted(set(tasks) - (set() if compressed else set(folded))):
        raise CaloraError(
            "tasks", "names of plain LoRAs", unknown[0], "leave it out: the adapter's folder says its task"
        )
    return Source(base, model, report, load_tokenizer(base), shared_lora(model), folded, paths)


def read_folded(base: Path, fingerprint: str, path: Path) -> Adapter:
    """The LoRA that an adapter of a compressed base (its folder, its fingerprint) folds into, with what its calora.json says."""
    read = read_adapter(path)
    made_for = read.meta["compressed_fingerprint"]
    if made_for != fingerprint:
        found = f"the base {fingerprint} of {base}"
        raise CaloraError(f"adapter {path}", f"the base that it was made for, {made_for}", found, "name that base")
    return _folded(read, path)


def _folded(read: Adapter, path: Path) -> Adapter:
    folded = fold(read)
    if not folded.lora:
        raise CaloraError(
            f"adapter {path}", "a LoRA or a linear bypass", "neither", "leave it out: it is the base alone"
        )
    folded.meta = read.meta
    return folded


def export_adapter(base: str | Path, path: str | Path, out: Path) -> Task:
    """Write the GGUF LoRA of one adapter, for a base.gguf of `base` and beside its recovery; returns its task.

    Raises:
        CaloraError: as `export`.
    """
    report = read_json(Path(base) / REPORT, "name the folder of a compressed model")
    adapter = read_folded(Path(base), report["fingerprint"], Path(path))
    architecture = Architecture.of(AutoConfig.from_pretrained(base, local_files_only=True))
    entries = {"base_fingerprint": report["base_fingerprint"], "compressed_fingerprint": report["fingerprint"]}
    write_lora(out, architecture, adapter_tensors(adapter, architecture, "BF16"), entries | _told_of(adapter, "beside"))
    return Task.from_json(adapter.meta["task"])


def _told_of(adapter: Adapter, recovery: str) -> dict[str, str]:
    """What the metadata of its file says."""
    method = {"method": adapter.meta["method"]} if "method" in adapter.meta else {}
    return {"task": told(adapter.meta["task"]), "recovery": recovery, **method}


def _kinds(about: Mapping[str, Any]) -> list[str]:
    """Of an export that is there."""
    has = {"gguf": bool(about["base"]), "peft": any(file.startswith(f"{layout.DENSE}/") for file in about["files"])}
    return [kind for kind in KINDS if has[kind]]


def _about(source: Source, recovery: str) -> dict[str, Any]:
    """manifest.json, still without files."""
    report = source.report
    return {
        "version": layout.VERSION,
        "versions": versions(),
        "architecture": None,
        "context": source.model.config.max_position_embeddings,
        "base_fingerprint": report["base_fingerprint"],
        "compressed_fingerprint": report["fingerprint"],
        "recipe": report["recipe"],
        "recovery": recovery,
        "files": {},
        "base": None,
        "adapters": _entries(source),
    }


def _extended(there: Mapping[str, Any], source: Source, out: Path) -> dict[str, Any]:
    """manifest.json of an export, with further adapters that still have no files."""
    if (made := source.report["fingerprint"]) != (found := there["compressed_fingerprint"]):
        raise CaloraError(out, f"an export of {source.path}, {made}", f"one of {found}", "name that base")
    if taken := sorted(source.adapters.keys() & there["adapters"].keys()):
        raise CaloraError(out, "names that it does not have", taken[0], "name it: NAME=FOLDER, or export all anew")
    return {**there, "files": dict(there["files"]), "adapters": there["adapters"] | _entries(source)}


def _entries(source: Source) -> dict[str, Any]:
    return {
        name: {
            "file": None, "apply": [], "type": None, "peft": None, "task": task.to_json(),
            "method": source.adapters[name].meta.get("method"),
            "answer_ids": task.answer_token_ids(source.tokenizer) or [], "scores": {},
        }
        for name, task in source.tasks.items()
    }  # fmt: skip


def _write_gguf(
    scratch: Path, about: dict[str, Any], source: Source, requantise: str | None, adapter_type: str
) -> None:
    architecture, inside = Architecture.of(source.model.config), about["recovery"] == "inside"
    shared = {key: about[key] for key in ("base_fingerprint", "compressed_fingerprint")}
    if not about["base"]:
        _write_base(scratch, about, source, architecture, shared, requantise, adapter_type)
    (scratch / layout.ADAPTERS).mkdir(exist_ok=True)
    for name, adapter in source.adapters.items():
        whole, file = fold(adapter, source.shared) if inside else adapter, adapter_file(name)
        own = shared | _told_of(adapter, about["recovery"])
        write_lora(scratch / file, architecture, adapter_tensors(whole, architecture, adapter_type), own)
        apply = [file] if inside else [*about["base"]["apply"], file]
        about["adapters"][name] |= {"file": file, "apply": apply, "type": adapter_type}


def _write_base(
    scratch: Path, about: dict[str, Any], source: Source, architecture: Architecture, shared: dict[str, str],
    requantise: str | None, adapter_type: str,
) -> None:  # fmt: skip
    tensors, changed = base_tensors(source.model, architecture, requantise)
    rows, entries = source.model.config.vocab_size, {**shared, "recipe": told(about["recipe"])}
    write_base(
        scratch / layout.BASE, architecture, tensors, entries, lambda writer: add_vocabulary(writer, source.path, rows)
    )
    always = []
    if source.shared.lora:
        recovery = adapter_tensors(source.shared, architecture, adapter_type)
        write_lora(scratch / layout.RECOVERY, architecture, recovery, shared)
        always = [layout.RECOVERY]
    about |= {"architecture": architecture.name, "context": architecture.context}
    about["base"] = {"file": layout.BASE, "types": count_types(tensors), "rounded": changed, "apply": always}


def _write_peft(scratch: Path, about: dict[str, Any], source: Source, out: Path) -> None:
    """dense/ and peft/NAME; the recovery of the base is in the former, unless it goes inside the adapters."""
    inside = about["recovery"] == "inside"
    if not (scratch / layout.DENSE).exists():
        write_dense(scratch / layout.DENSE, source.model, source.path, merged=not inside)
    for name, adapter in source.adapters.items():
        whole = of_one_rank(fold(adapter, source.shared) if inside else adapter)
        folder, base = scratch / layout.PEFT / name, str(out / layout.DENSE)
        write_adapter(folder, whole, base, plain_card(source.tasks[name], base), dtype_of(source.model))
        assert whole.config is not None  # an adapter without layers was refused
        about["adapters"][name]["peft"] = {"folder": f"{layout.PEFT}/{name}", "rank": whole.config.r}


def _score(
    scratch: Path,
    about: dict[str, Any],
    source: Source,
    tests: Mapping[str, Sequence[Row]],
    hits: Mapping[str, Sequence[int]] | None,
    draws: int,
    seed: int,
    threads: int | None,
) -> None:
    examples = encoded(source.tasks, source.tokenizer, source.model.config, tests)
    known = {name: list(own) for name, own in (hits or {}).items() if name in tests}
    left = {name: examples[name] for name in tests if name not in known}
    if left and (source.path / REPORT).exists():
        known |= torch_hits(source.path, source.paths, left)
    elif left:
        known |= plain_hits(source.path, source.adapters, source.tasks, source.tokenizer, left)
    tokens: dict[str, dict[str, int]] = {}
    found = {}
    if about["base"]:
        found["gguf"], tokens = llama_hits(scratch, source.tasks, source.tokenizer, examples, tests, threads)
    if (scratch / layout.PEFT).exists():
        found["peft"] = peft_hits(scratch, source.tasks, source.tokenizer, examples)
    for kind, by_name in found.items():
        for name, ours in by_name.items():
            score = compared(ours, known[name], draws, seed)
            about["adapters"][name]["scores"][kind] = score | ({"tokens": tokens[name]} if kind == "gguf" else {})
