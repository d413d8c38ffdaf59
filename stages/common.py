"""What every stage shares: where artifacts live, and how a stage starts and fails."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

from calora.errors import CaloraError
from stages.config import Params, load_params

BASE, SMALL = Path("models/base"), Path("models/small")
CALIBRATION = Path("data/calibration/texts.jsonl")
CHECKPOINTS = Path("checkpoints")


def data(task: str) -> Path:
    """Splits of a task."""
    return Path("data") / task


def teacher(task: str) -> Path:
    """The LoRA on the uncompressed LLM."""
    return Path("models/teacher") / task


def targets(task: str) -> Path:
    """The teacher's outputs for every training text."""
    return Path("models/targets") / task


def compressed(recipe: str) -> Path:
    """A compressed base."""
    return Path("models/compressed") / recipe


def adapter(method: str, task: str, recipe: str) -> Path:
    """An adapter for a compressed base: `inherited`, `clm_lora`, `clm_lora_qk` or `calora`."""
    return Path("models") / method / task / recipe


def small_lora(task: str) -> Path:
    """The LoRA on the small dense baseline."""
    return Path("models/small_lora") / task


def results(*parts: str) -> Path:
    """Metrics, predictions, curves."""
    return Path("results").joinpath(*parts)


def run(stage: Callable[..., None]) -> None:
    """Call `stage(params, *arguments of the command line)`; a user's mistake ends it with one line and exit code 1.

    CALORA_DEBUG=1 shows the traceback of such a mistake too.
    """
    try:
        params: Params = load_params()
        stage(params, *sys.argv[1:])
    except KeyboardInterrupt:
        print("interrupted: the next `dvc repro` goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    except (CaloraError, OSError) as error:
        if os.environ.get("CALORA_DEBUG") == "1":
            raise
        message = _full_disk(error) if isinstance(error, OSError) else str(error)
        print(f"error: {message}", file=sys.stderr)
        sys.exit(1)


def _full_disk(error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        where = error.filename or "the project's folder"
        return f"{where}: expected room to write, found a full disk. Fix: free space (`dvc gc -w` drops old runs), then run again"
    return f"{error.filename or 'system'}: {error.strerror or error}. Fix: check the path and its permissions, then run again"
