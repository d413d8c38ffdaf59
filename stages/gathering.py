"""What a stage gathers piece by piece: where DVC removes nothing, so that an interrupted run goes on."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import calora
from calora.common.files import digest, replace_directory, write_json
from calora.common.versions import FILE, versions
from stages.common import CHECKPOINTS

CODE = Path(calora.__file__).parent


@contextmanager
def gathered(out: Path, *parts: object) -> Iterator[Path]:
    """Yield a folder that becomes `out` when the block ends; after a kill the same folder, if code and `parts` are the same."""
    key = repr((versions(), digest(CODE, suffixes=(".py",)), parts))
    unfinished = CHECKPOINTS / out / hashlib.sha256(key.encode()).hexdigest()
    yield unfinished
    write_json(unfinished / FILE, versions())
    replace_directory(unfinished, out)
    shutil.rmtree(CHECKPOINTS / out)  # with what an earlier, abandoned run left there
