"""`make ui`: a Prefect server on this machine only, the deployment, and the pages of finished runs; Ctrl-C ends all three."""

import functools
import http.server
import signal
import subprocess
import threading
import time

from calora.errors import CaloraError
from pipeline.checkout import owned
from pipeline.process import end
from pipeline.server import HOST, LOG, check_free, server, settings, start
from pipeline.settings import ROOT
from pipeline.show import REPORTS, SERVED


def serve_ui(port: int, runs: int) -> int:
    """Start everything, print the URL once server and deployment answer, and wait for Ctrl-C.

    Args:
        port: of the server; the pages of results have the next one.
        runs: that work at the same time.

    Raises:
        CaloraError: a port is taken, this folder has a server already, or one of the processes ended.
    """
    for number in (port, port + 1):
        check_free(number)
    LOG.parent.mkdir(exist_ok=True)
    with owned(LOG.with_name("ui")) as mine:
        if not mine:
            raise CaloraError(
                "make ui", "one for each folder", "another that is running here", "use it, or stop it with Ctrl-C"
            )
        return serve_alone(port, runs)


def serve_alone(port: int, runs: int) -> int:
    """The same, where nobody else serves this folder."""
    LOG.unlink(missing_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells in the background hand down "ignored"
    more = {**settings(port), SERVED: f"http://{HOST}:{port + 1}"}
    deployment = f"http://{HOST}:{port}/api/deployments/name/ca-lora/local"
    processes: list[subprocess.Popen[str]] = []
    try:
        processes.append(server(port))
        processes.append(start(["pipeline.serve", str(runs)], deployment, more))
        serve_reports(port + 1)
        print(
            f"http://{HOST}:{port}/deployments (the deployment is ca-lora/local; Ctrl-C ends the server and every run)",
            flush=True,
        )
        while all(process.poll() is None for process in processes):
            time.sleep(0.5)
        raise CaloraError("make ui", "the server and the deployment to go on", "that one of them ended", f"read {LOG}")
    except KeyboardInterrupt:
        print("stopping", flush=True)
        return 0
    finally:
        for process in reversed(processes):
            end(process)


def serve_reports(port: int) -> None:
    """The pages of finished runs, for links and pictures in the UI."""
    (ROOT / REPORTS).mkdir(parents=True, exist_ok=True)
    handler = functools.partial(Quiet, directory=str(ROOT / REPORTS))
    pages = http.server.ThreadingHTTPServer((HOST, port), handler)
    threading.Thread(target=pages.serve_forever, daemon=True).start()


class Quiet(http.server.SimpleHTTPRequestHandler):
    """No line for each request."""

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""
