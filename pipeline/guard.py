"""Run a command in this process group, and take the whole group down once the command, or whoever started this, is gone.

`python guard.py COMMAND ...` with a pipe as standard input: the pipe closes when its other end exits, however it does.
A file of its own, without imports from the project: it runs by its path, in whatever checkout the command works.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading

GRACE = 1.0  # seconds between asking and killing; Prefect's runner looks 3 s after a cancel whether the run is gone


def follow(child: "subprocess.Popen[bytes]") -> None:
    """Wait for the end of standard input; then interrupt the group, and kill what is left of it."""
    while os.read(0, 1024):
        pass
    os.killpg(0, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(GRACE)
    os.killpg(0, signal.SIGKILL)


def main() -> int:
    """The exit code of the command."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells in the background hand down "ignored"
    child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the group gets it too, and this process has to outlive the child
    threading.Thread(target=follow, args=(child,), daemon=True).start()
    code = child.wait()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)  # a command that was killed leaves its own children behind
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
