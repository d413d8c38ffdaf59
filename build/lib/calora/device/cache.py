"""What calora keeps from one process to the next: exports of compressed bases, and which runtime was faster here."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from calora.common.files import read_json, replace_directory
from calora.common.versions import versions
from calora.device.export import export
from calora.device.folder import read_folder
from calora.errors import CaloraError
from calora.saving import REPORT

CACHE = "CALORA_CACHE"  # environment variable


def cache_folder() -> Path:
    """CALORA_CACHE, or `calora` in the user's folder for such files."""
    given = os.environ.get(CACHE)
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "calora"


def exported(base: Path) -> Path:
    """The folder of base.gguf of a compressed model, without adapters; made where there is none by this version.

    Raises:
        CaloraError: as `export`.
    """
    report = read_json(base / REPORT, "name the folder of a compressed model")
    folder = cache_folder() / "gguf" / str(report["fingerprint"])[:16]
    try:
        about = read_folder(folder)
        if about["versions"] == versions() and about["compressed_fingerprint"] == report["fingerprint"]:
            return folder
    except CaloraError:
        pass  # there is none, or a broken one
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=".") as scratch:  # of its own: two processes may be at it
        about = export(base, [], Path(scratch) / "out")
        replace_directory(Path(scratch) / "out", folder)
    size = sum(entry["bytes"] for entry in about["files"].values())
    print(f"calora: {base} for llama.cpp is kept in {folder} ({size / 1e6:.0f} MB)", file=sys.stderr)
    return folder
