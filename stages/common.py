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
DOWNLOADED = "downloaded.json"  # in models/base: the bytes of what it was made from
METHODS, STARTS = Path("models/methods"), Path("models/starts")
TAKEN = Path("models/taken")  # what recipes take that others have compressed
CALIBRATION, TUNING = Path("data/calibration/texts.jsonl"), Path("data/calibration/tuning.jsonl")
CHECKPOINTS = Path("checkpoints")
ACCELERATE = (  # its name for several processes on one machine, on CPUs too
    "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
)  # fmt: skip


def data(task: str) -> Path:
    """Splits of a task."""
    return Path("data") / task


def brought(task: str) -> Path:
    """The adapter that the user brought for a task; without one, a note."""
    return Path("models/brought") / task


def teacher(task: str) -> Path:
    """The LoRA on the uncompressed LLM."""
    return Path("models/teacher") / task


def targets(task: str) -> Path:
    """The teacher's outputs for every training text."""
    return Path("models/targets") / task


def labels(task: str) -> Path:
    """The teacher's answers to validation and test texts without labels; where all have one, a note."""
    return Path("models/labels") / task


def written(task: str, method: str) -> Path:
    """The texts that the teacher wrote for a method, and its outputs for them; for most methods a note."""
    return Path("models/written") / task / method


def compressed(recipe: str) -> Path:
    """A compressed base."""
    return Path("models/compressed") / recipe


def inherited(task: str, recipe: str) -> Path:
    """The starts of the methods, each in a folder of its own: its adapter before any step."""
    return Path("models/inherited") / task / recipe


def adapter(method: str, task: str, recipe: str) -> Path:
    """The adapter that a method made for a compressed base."""
    return Path("models") / method / task / recipe


def evaluated(task: str, recipe: str) -> Path:
    """What `evaluate` found: metrics, answers, curves."""
    return Path("models/evaluated") / task / recipe


def exported(task: str, recipe: str) -> Path:
    """A folder for other runtimes."""
    return Path("models/export") / task / recipe


def small_lora(task: str) -> Path:
    """The LoRA on the small dense baseline."""
    return Path("models/small_lora") / task


def results(*parts: str) -> Path:
    """Metrics, predictions, curves."""
    return Path("results").joinpath(*parts)


def run(stage: Callable[..., None], trains: bool = False) -> None:
    """Call `stage(params, *arguments of the command line)`; a user's mistake ends it with one line and exit code 1.

    CALORA_DEBUG=1 shows the traceback of such a mistake too. One that trains does so on every GPU.
    """
    try:
        params: Params = load_params()
        choose(params)
        if trains:
            launch()
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


def choose(params: Params) -> None:
    """Let `device` and `dtype` hold for this process and those that it starts; of both the environment has the last word."""
    os.environ.setdefault("CALORA_DEVICE", params.device)
    os.environ.setdefault("CALORA_DTYPE", params.dtype)


def launch() -> None:
    """Start this command again as a process for each GPU, through accelerate, where there are several.

    CALORA_PROCESSES is another number of them, on CPUs too.
    """
    from calora.common.devices import gpus  # torch is not for stages that only read and write

    count = int(os.environ.get("CALORA_PROCESSES", gpus()))
    if count > 1 and "LOCAL_RANK" not in os.environ:
        module = sys.modules["__main__"].__spec__
        assert module
        command = [*ACCELERATE, "--num_processes", str(count), "--module", module.name, *sys.argv[1:]]
        os.execv(sys.executable, [sys.executable, *command])


def _full_disk(error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        where = error.filename or "the project's folder"
        return f"{where}: expected room to write, found a full disk. Fix: free space (`dvc gc -w` drops old runs), then run again"
    return f"{error.filename or 'system'}: {error.strerror or error}. Fix: check the path and its permissions, then run again"
