"""`make ui`: a Prefect server on this machine only, the deployment, and the pages of finished runs; Ctrl-C ends all three."""

import functools
import http.server
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

from calora.errors import CaloraError
from pipeline.process import end, environment, guarded
from pipeline.settings import PREFECT, ROOT
from pipeline.show import REPORTS, SERVED

HOST, PATIENCE = "127.0.0.1", 60.0  # seconds until the server has to answer


def settings(port: int) -> dict[str, str]:
    """Prefect's: its state inside the project, nothing sent home."""
    return {
        **PREFECT, "PREFECT_API_URL": f"http://{HOST}:{port}/api", "PREFECT_SERVER_UI_API_URL": f"http://{HOST}:{port}/api",
        "PREFECT_CLI_PROMPT": "false", "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        SERVED: f"http://{HOST}:{port + 1}",
    }  # fmt: skip


def serve_ui(port: int, runs: int) -> int:
    """Start everything, print the URL once server and deployment answer, and wait for Ctrl-C.

    Args:
        port: of the server; the pages of results have the next one.
        runs: that work at the same time.
    """
    for number in (port, port + 1):
        check_free(number)
    log = ROOT / ".prefect/server.log"
    log.parent.mkdir(exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells in the background hand down "ignored"
    started: list[subprocess.Popen[str]] = []
    try:
        with log.open("wb") as file:
            python, env = [sys.executable, "-m"], environment(**settings(port))
            server = [*python, "prefect", "server", "start", "--host", HOST, "--port", str(port)]
            started.append(guarded(server, ROOT, env, file))
            wait_for(f"http://{HOST}:{port}/api/health", started[0], log)
            started.append(guarded([*python, "pipeline.serve", str(runs)], ROOT, env, file))
            wait_for(f"http://{HOST}:{port}/api/deployments/name/ca-lora/local", started[1], log)
        serve_reports(port + 1)
        print(
            f"http://{HOST}:{port}/deployments (the deployment is ca-lora/local; Ctrl-C ends the server and every run)",
            flush=True,
        )
        while all(process.poll() is None for process in started):
            time.sleep(0.5)
        raise CaloraError("make ui", "the server and the deployment to go on", "that one of them ended", f"read {log}")
    except KeyboardInterrupt:
        print("stopping", flush=True)
        return 0
    finally:
        for process in reversed(started):
            end(process)


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


def wait_for(url: str, process: "subprocess.Popen[str]", log: Path) -> None:
    """Wait until a page answers."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    found = "no answer" if process.poll() is None else f"exit code {process.poll()}"
    raise CaloraError(url, f"an answer within {PATIENCE:.0f} s", found, f"read {log}")


def serve_reports(port: int) -> None:
    """The pages of finished runs, for links and pictures in the UI."""
    (ROOT / REPORTS).mkdir(parents=True, exist_ok=True)
    handler = functools.partial(Quiet, directory=str(ROOT / REPORTS))
    server = http.server.ThreadingHTTPServer((HOST, port), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()


class Quiet(http.server.SimpleHTTPRequestHandler):
    """No line for each request."""

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""
