"""Look at a LoRA: a PEFT folder, or an adapter of the hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from calora.common.files import check_tensors, fingerprint, read_json
from calora.errors import CaloraError
from pipeline.adopt.own import Own
from pipeline.adopt.wanted import Entry, Said, asked, hub_id, million

if TYPE_CHECKING:
    from calora.preview.outline import Outline

FILES = ("adapter_config.json", "adapter_model.safetensors")
FIX = "name a folder that PEFT wrote"


def look(text: str, name: str, base: Outline | None, own: Own, said: Said) -> Entry:
    """What `--adapter` names, placed in own/<name>-lora: the entry of teacher.adapters.

    Raises:
        CaloraError: it is no adapter that calora carries, or one of another base.
    """
    folder, fetched = _folder(text)
    raw = read_json(folder / FILES[0], FIX)
    check_tensors(folder / FILES[1], FIX)
    describe(text, folder, raw, base, said)
    placed = [own.file(folder / file, Path("own") / f"{name}-lora", copy=fetched) for file in FILES]
    return {"path": placed[0].parent.as_posix(), "sha256": fingerprint(folder)}


def _folder(text: str) -> tuple[Path, bool]:
    """Where its files are, and whether they were fetched from the hub."""
    path = Path(text).expanduser()
    if path.is_dir():
        return path, False
    if path.is_file():
        found = f"a file, {path}"
        fix = "name the folder that PEFT wrote (of a GGUF the one that it was made from)"
        raise CaloraError("--adapter", "a folder that PEFT wrote, or a hub id", found, fix)
    from huggingface_hub import snapshot_download

    found_id = hub_id(text, "model", "--adapter")
    where = f"--adapter {text}"
    fetch = lambda: snapshot_download(found_id.repo, revision=found_id.revision, allow_patterns=list(FILES))  # noqa: E731
    return Path(asked(where, fetch)), True


def describe(text: str, folder: Path, raw: Entry, base: Outline | None, said: Said) -> None:
    """What the command tells of an adapter; raises where it cannot be carried."""
    from calora.adapters.features import plain_lora
    from calora.adapters.foreign import REPEATABLE, import_lora

    lines = [text, _kind(raw)]
    start = str(raw.get("init_lora_weights")).lower()
    if base is None:
        plain_lora(folder / FILES[0], raw, (*_starts(), *REPEATABLE))
        said.unsure.append("whether the adapter fits the base: that is not on this machine yet")
    elif start in REPEATABLE:
        said.unsure.append(f"what {start} took from the base's weights: that is computed when it is imported")
    else:
        try:
            adapter = import_lora(folder, base.model)
        except (NotImplementedError, RuntimeError):  # something has to be compared with weights, and there are none yet
            said.unsure.append("whether the adapter's other tensors are the base's own: that is compared at import")
        else:
            lines.append(f"fits the base: {len(adapter.lora_layers)} layers, {million(adapter.parameters)} parameters")
    if trained_on := raw.get("base_model_name_or_path"):
        lines.append(f"trained on {trained_on}")
    said.add("adapter", *lines)


def _kind(raw: Entry) -> str:
    targets = raw.get("target_modules") or "?"
    targets = ", ".join(sorted(targets)) if isinstance(targets, list) else str(targets)
    more = [
        key for key in ("use_rslora", "use_dora", "modules_to_save", "rank_pattern", "lora_dropout") if raw.get(key)
    ]
    return (
        f"{raw.get('peft_type')}, rank {raw.get('r')}, alpha {raw.get('lora_alpha')}, on {targets}"
        f"{' (' + ', '.join(more) + ')' if more else ''}"
    )


def _starts() -> tuple[str, ...]:
    from calora.adapters.features import PLAIN_STARTS

    return PLAIN_STARTS
