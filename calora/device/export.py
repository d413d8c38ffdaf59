"""Export a compressed base with its adapters for other runtimes: GGUF for llama.cpp, plain folders for transformers, PEFT and vLLM."""

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
from calora.common.files import read_json, whole_directory, write_json, write_text
from calora.common.versions import versions
from calora.compressed import stored_form
from calora.device import folder as layout
from calora.device.architecture import Architecture
from calora.device.blocks import REQUANTISED, count_types
from calora.device.card import export_card
from calora.device.catalogue import BASE_NAME
from calora.device.dense import dtype_of, write_dense
from calora.device.runtime import library
from calora.device.score import adapter_file, compared, encoded, llama_hits, peft_hits, torch_hits
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
        path: folder of the compressed base.
        model: in its stored form.
        report: its compression.json.
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
    tests: Mapping[str, Sequence[Row]] | None = None,
    hits: Mapping[str, Sequence[int]] | None = None,
    draws: int = 2000,
    seed: int = 0,
    threads: int | None = None,
) -> dict[str, Any]:
    """Write a folder that other runtimes serve (`calora.device.folder` describes it), whole or not at all.

    base.gguf has the compressed model's numbers (int8 in Q8_0, symmetric int4, int3 and int2 in Q4_0, asymmetric int4 in
    Q5_0); an adapter is the LoRA that its linear form folds into (`calora.fold`).

    Args:
        base: a compressed model.
        adapters: adapter folders, by name or by the names of their tasks.
        out: the folder to write; an earlier export there is replaced.
        kinds: `gguf` (llama.cpp) and `peft` (dense/ and peft/NAME: transformers, PEFT, vLLM).
        requantise: round layers that no type of GGUF holds exactly to this one, such as Q8_0; the card names them.
        adapter_type: of the LoRAs in GGUF: BF16, F16, F32 or Q8_0.
        recovery: where the base's recovery goes, if it has one: `beside` (recovery.gguf, on under every adapter; in dense/)
            or `inside` (each adapter: faster, larger files; recovery.gguf is for the base alone).
        tests: adapter -> labelled rows: it is scored on them, and the card says so.
        hits: adapter -> whether the torch model is right on each of these rows, where that is known already.
        draws, seed: of the bootstrap.
        threads: of llama.cpp.

    Returns:
        What manifest.json holds.

    Raises:
        CaloraError: an argument is none of these, a file is broken, an adapter is another base's or not linear, a layer has
            no exact type, llama.cpp has no such architecture or tokenizer, or tests are given and xllamacpp is not installed.
    """
    _check(Path(out), kinds, adapter_type, recovery, requantise)
    if tests and "gguf" in kinds:
        library()
    source = read_source(Path(base), adapters)
    if unknown := sorted(set(tests or {}) - set(source.adapters)):
        raise CaloraError("tests", f"names among {', '.join(source.adapters)}", unknown[0], "name an adapter")
    with whole_directory(Path(out)) as scratch:
        about = _about(source)
        if "gguf" in kinds:
            _write_gguf(scratch, about, source, requantise, adapter_type, recovery == "inside")
        if "peft" in kinds:
            _write_peft(scratch, about, source, Path(out), recovery == "inside")
        about["files"] = layout.files_of(scratch)
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


def read_source(base: Path, adapters: Mapping[str, str | Path] | Iterable[str | Path]) -> Source:
    """Read all that is exported, before anything is written."""
    model, report = stored_form(base)
    named: list[tuple[str | None, Path]] = (
        [(name, Path(path)) for name, path in adapters.items()]
        if isinstance(adapters, Mapping)
        else [(None, Path(path)) for path in adapters]
    )
    folded: dict[str, Adapter] = {}
    paths: dict[str, Path] = {}
    for given, path in named:
        adapter = read_folded(base, report["fingerprint"], path)
        name = given or str(adapter.meta["task"]["name"])
        if not re.fullmatch("[A-Za-z0-9_-]+", name) or name in [*folded, BASE_NAME]:
            found = f"{name!r}{', twice' if name in folded else ''}"
            raise CaloraError(
                f"adapter {path}", "a name of letters, digits, _ and - of its own", found, "name it: NAME=FOLDER"
            )
        folded[name], paths[name] = adapter, path
    return Source(base, model, report, load_tokenizer(base), shared_lora(model), folded, paths)


def read_folded(base: Path, fingerprint: str, path: Path) -> Adapter:
    """The LoRA that an adapter of a compressed base (its folder, its fingerprint) folds into, with what its calora.json says."""
    read = read_adapter(path)
    made_for = read.meta["compressed_fingerprint"]
    if made_for != fingerprint:
        found = f"the base {fingerprint} of {base}"
        raise CaloraError(f"adapter {path}", f"the base that it was made for, {made_for}", found, "name that base")
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
    write_lora(out, architecture, adapter_tensors(adapter, architecture, "BF16"), entries | _task_of(adapter))
    return Task.from_json(adapter.meta["task"])


def _task_of(adapter: Adapter) -> dict[str, str]:
    """As the metadata of its file has it."""
    return {"task": told(adapter.meta["task"])}


def _about(source: Source) -> dict[str, Any]:
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
        "files": {},
        "base": None,
        "adapters": {
            name: {
                "file": None, "apply": [], "type": None, "peft": None, "task": task.to_json(),
                "answer_ids": task.answer_token_ids(source.tokenizer) or [], "scores": {},
            }
            for name, task in source.tasks.items()
        },
    }  # fmt: skip


def _write_gguf(
    scratch: Path, about: dict[str, Any], source: Source, requantise: str | None, adapter_type: str, inside: bool
) -> None:
    architecture = Architecture.of(source.model.config)
    tensors, changed = base_tensors(source.model, architecture, requantise)
    shared = {key: about[key] for key in ("base_fingerprint", "compressed_fingerprint")}
    rows = source.model.config.vocab_size
    entries = {**shared, "recipe": told(about["recipe"])}
    write_base(
        scratch / layout.BASE, architecture, tensors, entries, lambda writer: add_vocabulary(writer, source.path, rows)
    )
    always = []
    if source.shared.lora:
        write_lora(
            scratch / layout.RECOVERY, architecture, adapter_tensors(source.shared, architecture, adapter_type), shared
        )
        always = [layout.RECOVERY]
    about |= {"architecture": architecture.name, "context": architecture.context}
    about["base"] = {"file": layout.BASE, "types": count_types(tensors), "rounded": changed, "apply": always}
    (scratch / layout.ADAPTERS).mkdir()
    for name, adapter in source.adapters.items():
        whole, file = fold(adapter, source.shared) if inside else adapter, adapter_file(name)
        entries = shared | _task_of(adapter)
        write_lora(scratch / file, architecture, adapter_tensors(whole, architecture, adapter_type), entries)
        apply = [file] if inside else [*always, file]
        about["adapters"][name] |= {"file": file, "apply": apply, "type": adapter_type}


def _write_peft(scratch: Path, about: dict[str, Any], source: Source, out: Path, inside: bool) -> None:
    """dense/ and peft/NAME; the recovery of the base is in the former, unless it goes inside the adapters."""
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
    known |= torch_hits(source.path, source.paths, left) if left else {}
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
