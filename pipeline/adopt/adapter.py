"""Look at an adapter: a folder that PEFT or mlx-lm wrote, or one of the hub."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from calora.adapters.places import CONFIG, LORA, MLX, TOKENIZER, adapter_files, is_mlx
from calora.common.files import fingerprint, read_json
from calora.errors import CaloraError
from pipeline.adopt.own import Own
from pipeline.adopt.wanted import Entry, Said, asked, hub_id, million

if TYPE_CHECKING:
    from calora.preview.outline import Outline

FIX = "name a folder that PEFT or mlx-lm wrote"


def look(text: str, name: str, base: Outline | None, own: Own, said: Said) -> Entry:
    """What `--adapter` names, placed in own/<name>-lora: the entry of teacher.adapters.

    Raises:
        CaloraError: it is no adapter that calora takes, or one of another base.
    """
    folder, fetched = _folder(text)
    files = adapter_files(folder)
    describe(text, folder, read_json(files[0], FIX), base, said)
    tokenizer = (folder / file for file in TOKENIZER if (folder / file).exists())
    placed = [own.file(file, Path("own") / f"{name}-lora", copy=fetched) for file in (*files, *tokenizer)]
    return {"path": placed[0].parent.as_posix(), "sha256": fingerprint(folder)}


def _folder(text: str) -> tuple[Path, bool]:
    """Where its files are, and whether they were fetched from the hub."""
    path = Path(text).expanduser()
    if path.is_dir():
        return path, False
    if path.is_file():
        found = f"a file, {path}"
        fix = "name the folder that PEFT or mlx-lm wrote (of a GGUF the one that it was made from)"
        raise CaloraError("--adapter", "a folder that PEFT or mlx-lm wrote, or a hub id", found, fix)
    from huggingface_hub import snapshot_download

    found_id = hub_id(text, "model", "--adapter")
    where = f"--adapter {text}"
    files = [CONFIG, LORA, MLX, *TOKENIZER]
    fetch = partial(snapshot_download, found_id.repo, revision=found_id.revision, allow_patterns=files)
    return Path(asked(where, fetch)), True


def describe(text: str, folder: Path, raw: Entry, base: Outline | None, said: Said) -> None:
    """What the command tells of an adapter; raises where it cannot be taken."""
    from calora.adapters.foreign import REPEATABLE
    from calora.adapters.teachers import Whole, import_adapter

    lines = [text, "mlx-lm's" if is_mlx(folder) else _kind(raw)]
    start = str(raw.get("init_lora_weights")).lower()
    if base is None:
        said.unsure.append("whether the adapter fits the base: that is not on this machine yet")
    elif start in REPEATABLE:
        said.unsure.append(f"what {start} took from the base's weights: that is computed when it is imported")
    else:
        try:
            adapter = import_adapter(folder, base.model, base.tokenizer)
        except (NotImplementedError, RuntimeError):  # something has to be compared with weights, and there are none yet
            said.unsure.append("whether the adapter's other tensors are the base's own: that is compared at import")
        else:
            if isinstance(adapter, Whole):
                lines.append(f"more than a plain LoRA ({', '.join(adapter.beyond)}): it is distilled from as it is")
            else:
                count = len(adapter.lora_layers)
                lines.append(f"fits the base: {count} layers, {million(adapter.parameters)} parameters")
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
