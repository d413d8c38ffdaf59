"""calora's own entries in the metadata of a GGUF file. Nothing here imports torch."""

from __future__ import annotations

from pathlib import Path

import gguf

from calora.errors import CaloraError

MARK = "calora."  # in front of each


def read_entries(path: Path) -> dict[str, str]:
    """Our own entries of a file's metadata: the fingerprints, for example.

    Raises:
        CaloraError: it is no whole GGUF file.
    """
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: str(field.contents()) for name, field in reader.fields.items() if name.startswith(MARK)}
    except (OSError, ValueError, IndexError, KeyError) as error:
        found = " ".join(str(error).split()) or type(error).__name__
        raise CaloraError(path, "a whole GGUF file", found, "export it again") from None
    return {name.removeprefix(MARK): value for name, value in fields.items()}


def check_pair(base: Path, adapter: Path) -> None:
    """Raise `CaloraError` unless two GGUF files were made for each other, by their metadata."""
    check_made_for(adapter, read_entries(base).get("compressed_fingerprint"), base)


def check_made_for(adapter: Path, fingerprint: str | None, base: Path) -> None:
    """Raise `CaloraError` unless a GGUF file is an adapter of the compressed base `base`, which has this fingerprint."""
    made_for = read_entries(adapter).get("compressed_fingerprint")
    if made_for is None or made_for != fingerprint:
        fix = "use the base that it was made for"
        raise CaloraError(f"adapter {adapter}", f"its compressed base {made_for}", f"{base}, {fingerprint}", fix)
