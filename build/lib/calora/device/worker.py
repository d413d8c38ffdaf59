"""llama.cpp's server in a process of its own, because it reads LoRAs only at its start: others are another process.

In this one, xllamacpp would hold the interpreter while it loads, could wait for ever when it is ended just after its start,
and would keep memory that it has given back.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from calora.device.runtime import INSTALL, start
from calora.errors import CaloraError

# llama.cpp allocates its graphs anew at each switch. By default glibc learns to keep blocks of such sizes, in pieces: with 64
# adapters 380 MB more than they take, with 8 120. (Other systems don't know this name.)
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**24)}
RUN = "import sys; sys.path[:] = sys.argv[1:]; from calora.device.worker import main; main()"


class Worker:
    """The process; it ends with this one, however that ends.

    Args:
        base, loras, context, slots, threads: see `calora.device.runtime.start`.

    Raises:
        CaloraError: xllamacpp is not installed.
    """

    def __init__(self, base: Path, loras: Mapping[str, Path], context: int, slots: int, threads: int | None) -> None:
        if find_spec("xllamacpp") is None:
            raise CaloraError("xllamacpp", "the package, to run llama.cpp", "none", INSTALL)
        asked = [str(base), {name: str(path) for name, path in loras.items()}, context, slots, threads]
        # A session of its own: Ctrl-C on a terminal is for the one that serves, which lets running requests end.
        self.process = subprocess.Popen(
            [sys.executable, "-c", RUN, *sys.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            start_new_session=True, env={**MALLOC, **os.environ},
        )  # fmt: skip
        assert self.process.stdin
        with suppress(BrokenPipeError):  # it has ended: `ready` says so
            self.process.stdin.write(json.dumps(asked) + "\n")
            self.process.stdin.flush()

    def ready(self) -> tuple[str, str]:
        """Wait until it answers: its address, and its key.

        Raises:
            CaloraError: llama.cpp cannot load a file, or has ended.
        """
        assert self.process.stdout
        with self.process.stdout as answer:
            said = answer.readline()
        if not said:
            code = self.process.wait()
            fix = "see above what it said; where memory is short, lower --memory, --slots or --context"
            raise CaloraError("llama.cpp", "a process that answers", f"one that ended with {code}", fix)
        found = json.loads(said)
        if "error" in found:
            raise CaloraError(*found["error"])
        return found["address"], found["key"]

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self.process.poll() is None

    def close(self) -> None:
        """End it, and wait for that; it has nothing to put in order."""
        self.process.kill()
        self.process.wait()
        assert self.process.stdin
        self.process.stdin.close()


def main() -> None:
    """The process: says where it serves, or what is wrong, and ends when its input does."""
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # a service manager sends them to all: they are for the other process
        signal.signal(number, signal.SIG_IGN)
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever llama.cpp prints
    base, loras, context, slots, threads = json.loads(sys.stdin.readline())
    try:
        server, key = start(Path(base), {name: Path(path) for name, path in loras.items()}, context, slots, threads)
    except CaloraError as error:
        print(json.dumps({"error": error.told}), file=answer, flush=True)
        os._exit(1)
    print(json.dumps({"address": server.listening_address, "key": key}), file=answer, flush=True)
    sys.stdin.read()  # to its end, which is that of the other process
    os._exit(0)
