"""Commands that end when they should: each in a process group of its own, stopped as a whole, under a guard."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from calora.errors import CaloraError
from pipeline import guard
from stages import SHARE_CORES

DVC = (sys.executable, "-m", "dvc")
# Lets the code of a folder check its own params.yaml.
CHECK_PARAMS = (sys.executable, "-c", "from stages.common import run; run(lambda params: None)")


def workers() -> int:
    """How many stages of a run may work side by side: CALORA_WORKERS.

    Raises:
        CaloraError: it is no whole number above 0.
    """
    text = os.environ.get("CALORA_WORKERS", "1")
    if not text.isdecimal() or int(text) < 1:
        raise CaloraError("CALORA_WORKERS", "a whole number from 1", repr(text), "unset it, or CALORA_WORKERS=2")
    return int(text)


def environment(**more: str) -> dict[str, str]:
    """This process's environment, with this interpreter's programs first on the PATH and without DVC's analytics.

    Programs that work side by side get their share of the cores, unless the user says otherwise.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    threads = max(1, len(os.sched_getaffinity(0)) // workers())
    shares = {**SHARE_CORES, **({"OMP_NUM_THREADS": str(threads)} if workers() > 1 else {})}
    return {**shares, **os.environ, "PATH": path, "DVC_NO_ANALYTICS": "1", "PYTHONUNBUFFERED": "1", **more}


def guarded(
    command: Sequence[str], folder: Path, env: Mapping[str, str], output: int | BinaryIO
) -> subprocess.Popen[str]:
    """Start a command in a group of its own, under a guard: it ends with this process, even if that is killed."""
    return subprocess.Popen(
        [sys.executable, guard.__file__, *command], cwd=folder, env=dict(env), stdin=subprocess.PIPE, stdout=output,
        stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
    )  # fmt: skip


class Stopped(Exception):
    """The run was asked to stop: nothing new starts."""

    def __init__(self) -> None:
        super().__init__("the run is being stopped")


class Processes:
    """The commands of one run."""

    def __init__(self) -> None:
        self._live: set[subprocess.Popen[str]] = set()
        self._lock = threading.RLock()  # a signal may call `stop` within `run`
        self._stopped = False

    def run(self, command: Sequence[str], folder: Path, say: Callable[[str], None]) -> int:
        """Run a command, hand each line of its output to `say`, and return its exit code.

        Raises:
            Stopped: `stop` was called, before or meanwhile.
        """
        with self._lock:
            if self._stopped:
                raise Stopped
            process = guarded(command, folder, environment(), subprocess.PIPE)
            self._live.add(process)
        assert process.stdout
        try:
            for line in process.stdout:
                if line := line.rstrip():
                    say(line)
            code = process.wait()
        except BaseException:
            end(process)
            raise
        finally:
            self._live.discard(process)
        if self._stopped:
            raise Stopped
        return code

    def stop(self) -> None:
        """Stop every command; those that would start now do not. Returns when all are gone."""
        with self._lock:
            self._stopped = True
        threads = [threading.Thread(target=end, args=(process,)) for process in list(self._live)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def end(process: subprocess.Popen[str]) -> None:
    """Interrupt a command's whole group, and kill what is left of it a few seconds later."""
    for number, patience in ((signal.SIGINT, guard.GRACE), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)
            process.wait(patience)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
