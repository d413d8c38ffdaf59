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
