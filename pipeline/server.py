"""Prefect's server, on this machine only: for the UI, or for as long as one command works."""

from __future__ import annotations

import atexit
import importlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

from calora.errors import CaloraError
from pipeline import guard
from pipeline.process import end, environment, guarded
from pipeline.settings import PREFECT, ROOT

HOST, PATIENCE = "127.0.0.1", 60.0  # seconds until the server has to answer
LOG = ROOT / ".prefect/server.log"


def preset() -> dict[str, str]:
    """Prefect's settings that hold with any server; what the user's environment says goes first."""
    return {key: os.environ.get(key, value) for key, value in PREFECT.items()}


def settings(port: int) -> dict[str, str]:
    """Prefect's: its state inside the project, nothing sent home."""
    return {
        **preset(), "PREFECT_API_URL": f"http://{HOST}:{port}/api", "PREFECT_SERVER_UI_API_URL": f"http://{HOST}:{port}/api",
        "PREFECT_CLI_PROMPT": "false", "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_RUNNER_POLL_FREQUENCY": "2",  # seconds from a click to its run, of 10
    }  # fmt: skip


def server(port: int, *options: str) -> subprocess.Popen[str]:
    """A server that answers, until `end`, or until this process ends, however that comes."""
    return start(served(port, *options), health(port), settings(port))


def served(port: int, *options: str) -> list[str]:
    """The module that is the server, and its arguments."""
    return ["prefect", "server", "start", "--host", HOST, "--port", str(port), *options]


def health(port: int) -> str:
    """What answers once the server does."""
    return f"http://{HOST}:{port}/api/health"


def start(module: list[str], url: str, settings: dict[str, str]) -> subprocess.Popen[str]:
    """`python -m ...` in the background, once `url` answers."""
    process = launch(module, settings)
    try:
        wait_for(url, process)
    except BaseException:
        end(process)
        raise
    return process


def launch(module: list[str], settings: dict[str, str]) -> subprocess.Popen[str]:
    """`python -m ...` in the background, its output in the log."""
    LOG.parent.mkdir(exist_ok=True)
    with LOG.open("ab") as log:
        return guarded([sys.executable, "-m", *module], ROOT, environment(**settings), log)


def alone() -> None:
    """Prefect without `make ui`: a server for this command alone, unless PREFECT_API_URL names one.

    Prefect would start one by itself, which then outlives a killed command. To be called before Prefect is imported:
    the server then ends after Prefect's own last words.
    """
    os.environ.update(preset())
    if "PREFECT_API_URL" not in os.environ:
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            port = probe.getsockname()[1]
        process, leaving = launch(served(port, "--no-ui", "--no-services"), settings(port)), threading.Event()

        def leave() -> None:
            leaving.set()
            end(process)

        atexit.register(leave)
        os.environ["PREFECT_API_URL"] = settings(port)["PREFECT_API_URL"]
        importlib.import_module("prefect")  # takes seconds, and so does the server's start
        wait_for(health(port), process)
        threading.Thread(target=leave_after, args=(process, leaving), daemon=True).start()


def leave_after(process: subprocess.Popen[str], leaving: threading.Event) -> None:
    """End this command when its server has ended: Prefect's client would look for it for minutes."""
    process.wait()
    if not leaving.is_set():
        told = CaloraError(
            "Prefect's server",
            "to go on",
            f"exit code {process.returncode}",
            f"read {LOG}; start the same run again: it goes on",
        )
        print(f"error: {told}", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)  # stops what runs, and removes the checkout
        time.sleep(guard.GRACE + 2)
        os._exit(1)  # Prefect's last words have no listener


def check_free(port: int) -> None:
    """Raise unless a port of this machine is free."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            raise CaloraError(
                f"port {port}", "a free port", "one that is taken", "stop what listens there, or `make ui PORT=4300`"
            ) from None


def wait_for(url: str, process: subprocess.Popen[str]) -> None:
    """Wait until a page answers."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    found = "no answer" if process.poll() is None else f"exit code {process.poll()}"
    raise CaloraError(url, f"an answer within {PATIENCE:.0f} s", found, f"read {LOG}")
